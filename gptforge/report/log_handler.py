"""Print what the package logs, as commands do; as a library, it leaves that to `logging`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from typing_extensions import override

PACKAGE = logging.getLogger("gptforge")
RESULT = logging.INFO + 5  # level of results, which are printed with `--quiet` too
EVENT = logging.DEBUG - 5
"""Level of the events of metrics.jsonl, which only `--log_format json` prints."""


class WriteHandler(logging.Handler):
    """Passes the text of each record to `write`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.write(record.getMessage())


@contextmanager
def log_to(write: Callable[[str], None], level: int = logging.INFO) -> Iterator[WriteHandler]:
    """Pass what the package logs to `write`, and nowhere else; also a decorator."""
    previous = PACKAGE.handlers, PACKAGE.level, PACKAGE.propagate
    handler = WriteHandler(write)
    handler.setLevel(level)
    PACKAGE.handlers, PACKAGE.propagate = [handler], False
    PACKAGE.setLevel(level)
    try:
        yield handler
    finally:
        PACKAGE.handlers, level, PACKAGE.propagate = previous
        PACKAGE.setLevel(level)


def shows_progress() -> bool:
    """Whether progress is shown: not with `--quiet` or `--log_format json`."""
    return PACKAGE.level in (logging.NOTSET, logging.DEBUG, logging.INFO)
