"""What may end a run before its last step: a signal or the clock."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Literal, Self

from gptforge import files

StopReason = Literal["finished", "interrupted", "terminated", "time_limit"]

STOP_REASONS: tuple[StopReason | None, ...] = (None, "time_limit", "interrupted", "terminated")
"""What a rank may wish, numbered for the others; the largest number wins."""

SIGHUP = getattr(signal, "SIGHUP", None)
"""A terminal that was closed; Windows has none."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([SIGHUP] if SIGHUP else []))

MIN_TRAIN_SECONDS = 1.0
"""A session trains at least so long, also where starting used up the time limit."""

EXIT_CODES: dict[StopReason, int] = {
    "finished": 0,
    "time_limit": 0,
    "interrupted": 128 + signal.SIGINT,
    "terminated": 128 + signal.SIGTERM,
}


class StopSignal:
    """Turns Ctrl-C, SIGTERM, SIGHUP and a time limit into a wish, which the loop asks about.

    It asks after each step. A second signal ends the process at once: what was saved is whole,
    since saves are renamed into place.

    Args:
        time_limit: minutes; 0 for none.
        started: when the time began to count, by `clock`; now if it is not given.
        clock: seconds that only go forward.
        say: tells the person who pressed Ctrl-C that it was heard.
    """

    def __init__(
        self,
        time_limit: float,
        *,
        log: Callable[[str], None],
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._say = log
        began = clock() if started is None else started
        self._deadline = began + 60 * time_limit if time_limit else float("inf")
        self._signal: StopReason | None = None
        self._previous: dict[int, object] = {}

    def stop_reason(self) -> StopReason | None:
        """Why to stop now, or None."""
        if self._signal is not None:
            return self._signal
        return "time_limit" if self._clock() >= self._deadline else None

    def should_stop(self) -> bool:
        """Whether a signal has come, or the time is over."""
        return StopSignal.stop_reason(self) is not None

    def __enter__(self) -> Self:
        # Each session gets on, however long it took to start.
        self._deadline = max(self._deadline, self._clock() + MIN_TRAIN_SECONDS)
        # Python lets only the main thread listen to signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup has a hang-up ignored, and is to be heeded.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            if sys.stdout.isatty():
                # The bar hid the cursor.
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
            os._exit(128 + number)
        self._signal = "interrupted" if number == signal.SIGINT else "terminated"
        if number == SIGHUP:
            # The terminal is gone: whoever wrote to it would fail.
            for stream in (sys.stdout, sys.stderr):
                if stream.isatty():
                    files.redirect_to_devnull(stream)
        self._say("Stopping after this step, then saving; once more stops at once, without.")
