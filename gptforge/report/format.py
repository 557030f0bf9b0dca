"""Counts and durations in readable form."""


def format_count(count: float) -> str:
    """'861 M', '113 T', '28.6 K': three digits and an SI prefix."""
    value, prefixes = float(count), iter(("", " K", " M", " G", " T", " P", " E", " Z"))
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / 1000, next(prefixes)
    return f"{value:.3g}{prefix}"


def format_duration(seconds: float) -> str:
    """'1 second', '40 seconds', '4 minutes', '3.2 hours', '12 days'."""
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.0f} days"
