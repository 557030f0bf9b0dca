"""Counts, durations, losses, times and tables in readable form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from gptforge.printable import pluralize, printable


def format_count(count: float) -> str:
    """'861 M', '113 T', '28.6 K': three digits and an SI prefix."""
    value = float(count)
    for prefix in ("", " K", " M", " G", " T", " P", " E"):
        if value < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g} Z"


def format_bytes(count: int) -> str:
    """'18 bytes', '6.23 KB', '1.2 GB': three digits from 1,000 bytes on."""
    return pluralize(count, "byte") if count < 1000 else f"{format_count(count)}B"


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


def format_time(seconds: object) -> str:
    """Seconds since 1970 as '2026-11-29 16:10 UTC'; empty for anything else."""
    try:
        return datetime.fromtimestamp(float(str(seconds)), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows, the first of which is the header, as a Markdown table with aligned columns."""
    header, *rest = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(3, *map(len, column)) for column in zip(header, *rest, strict=True)]
    rule = ["-" * width for width in widths]
    lines = (" | ".join(map(str.ljust, row, widths)) for row in (header, rule, *rest))
    return "\n".join(f"| {line} |" for line in lines)


@dataclass(frozen=True)
class ValLoss:
    """The loss of a model on held-out text, as sums over the text, or over the part done so far."""

    total_nats: float
    num_tokens: int
    num_bytes: int  # of UTF-8
    num_chars: int
    sequences_done: int = 1  # by all ranks together
    num_sequences: int = 1  # of the full evaluation

    @property
    def is_complete(self) -> bool:
        """Whether the evaluation was not interrupted."""
        return self.sequences_done >= self.num_sequences

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats per token."""
        return self.total_nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """The same information per byte of UTF-8 text."""
        return self.total_nats / math.log(2) / max(1, self.num_bytes)

    @property
    def nats_per_char(self) -> float:
        """The same information per character."""
        return self.total_nats / max(1, self.num_chars)


def format_val_loss(
    loss: float, bits_per_byte: float, nats_per_char: float, num_tokens: int
) -> str:
    """A held-out loss with its units, the same wherever the loss of a model is printed."""
    return (
        f"{loss:.4f} nats per token, perplexity {math.exp(min(loss, 700.0)):.2f}, "
        f"{bits_per_byte:.4f} bits per byte, {nats_per_char:.4f} nats per character, over "
        f"{num_tokens:,} tokens"
    )


def format_epochs(epochs: float) -> str:
    """A number of epochs; below 0.1 with two significant digits, so that it is not shown as 0."""
    return f"{epochs:.1f}" if epochs >= 0.1 else f"{epochs:.2g}"
