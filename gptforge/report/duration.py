"""Lengths of time, said as people say them."""


def in_words(seconds: float) -> str:
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
