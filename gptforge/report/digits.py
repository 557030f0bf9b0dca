"""Large numbers, as short as they can be read."""


def in_short(count: float) -> str:
    """861 M, 113 T, 28.6 K: three digits and a prefix."""
    value, prefixes = float(count), iter(("", " K", " M", " G", " T", " P", " E", " Z"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g}{prefix}"
