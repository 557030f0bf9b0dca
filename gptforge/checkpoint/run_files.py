"""The files of a run folder, and the lines of its metrics."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptforge import files
from gptforge.checkpoint.format import CONFIG

TEACHERS = "teachers"  # folder of a run's teachers, which are runs of their own
TRACKING = "tracking"  # folder of the files of experiment trackers
RUN_FOLDERS = {"checkpoints", TEACHERS, TRACKING}
RUN_FILES = RUN_FOLDERS | {
    *(CONFIG, "log.md", "metrics.jsonl", "samples.md", "training_curves.png", "report.html")
}
"""What a run leaves in its folder."""
MAX_METRICS_BYTES, MAX_LINE_BYTES = 2**28, 2**16
"""How much of the end of the metrics is read, more than a million lines, and of a line at once."""


def has_line(metrics: Path, text: str) -> bool:
    """Whether a line of a run's metrics contains a text."""
    return any(text.encode() in line for line in read_metrics_lines(metrics))


def read_metrics_lines(metrics: Path) -> Iterator[bytes]:
    """The lines of a run's metrics; none if the file is missing or not regular."""
    with suppress(OSError), files.open_regular(metrics, follow_symlinks=False) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_METRICS_BYTES))
        yield from iter(lambda: file.readline(MAX_LINE_BYTES), b"")
