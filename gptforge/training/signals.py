"""Reasons to stop before the last step: a signal or the time limit."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Literal, NoReturn, Self

from gptforge import files
from gptforge.distributed import Comm

logger = logging.getLogger(__name__)

StopReason = Literal["finished", "early_stop", "interrupted", "terminated", "time_limit"]

STOP_REASONS: tuple[StopReason | None, ...] = (None, "time_limit", "interrupted", "terminated")
"""Sorted by priority: the ranks agree on the largest index, by an all-reduce with max."""

STOPPED_BY: dict[StopReason, str] = {
    "interrupted": "Ctrl-C",
    "terminated": "SIGTERM or SIGHUP",
    "time_limit": "the time limit",
}

SIGHUP = getattr(signal, "SIGHUP", None)  # sent when the terminal closes; Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([SIGHUP] if SIGHUP else []))

MIN_TRAIN_SECONDS = 1.0
"""A process trains at least this long, even if startup used up the time limit."""

REPEAT_SECONDS = 1.0
"""A signal this soon after the first one is the same request: SLURM and systemd send SIGTERM to all
processes, and torchrun forwards the one that it gets to the ranks."""

# 128 + signal number is what a shell reports for a process that a signal ended.
EXIT_CODES: dict[StopReason, int] = {
    "finished": 0,
    "early_stop": 0,
    "time_limit": 0,
    "interrupted": 128 + signal.SIGINT,
    "terminated": 128 + signal.SIGTERM,
}

MESSAGE = "Stopping after this step, then saving. Ctrl-C again quits without saving."
SAVED_MESSAGE = "All is saved. Writing the report; Ctrl-C again quits at once."


class StopSignal:
    """Turns Ctrl-C, SIGTERM, SIGHUP and a time limit into a reason to stop.

    The training loop polls it after each step. A second Ctrl-C or SIGTERM, `REPEAT_SECONDS` or more
    after the first, ends the process at once; that leaves no half-written checkpoint, since saves
    are renamed into place. SIGHUP, which often accompanies SIGTERM, does not count. Once the loop
    has stopped on a signal and saved (`mark_saved`), another signal skips the remaining work, and
    the next one ends the process. The context manager is reentrant, for several training loops.

    Args:
        time_limit: minutes; 0 for none.
        started: start of the time limit, by `time.monotonic`; now if None.
    """

    def __init__(self, time_limit: float, *, started: float | None = None) -> None:
        started = time.monotonic() if started is None else started
        self._deadline = started + 60 * time_limit if time_limit else float("inf")
        self._signal: StopReason | None = None
        self._is_requested = False  # by anything but SIGHUP
        self._requested_at = 0.0
        self._requested_by = ""
        self._previous: dict[int, object] = {}
        self._depth = 0
        self._is_saved = False
        self.exits_on_second = True
        """Whether a second signal ends the process; otherwise it raises KeyboardInterrupt."""

    def stop_reason(self) -> StopReason | None:
        """Return why to stop now, or None."""
        if self._signal is not None:
            return self._signal
        return "time_limit" if time.monotonic() >= self._deadline else None

    def request(self, by: str) -> None:
        """Stop as after Ctrl-C; the log says that `by` stopped the run."""
        if self._signal is None:
            self._signal, self._requested_by = "interrupted", by
            self._is_requested = True

    def stopped_by(self, reason: StopReason) -> str:
        """The cause to log for this reason to stop."""
        return self._requested_by or STOPPED_BY[reason]

    def mark_saved(self, reason: StopReason) -> None:
        """Note that everything is saved; `reason` is why the training loop ended."""
        self._is_saved = True
        if reason in ("interrupted", "terminated"):
            self._signal, self._is_requested = None, False

    def should_stop(self) -> bool:
        """Whether a signal has arrived or the time is up."""
        return self._signal is not None or time.monotonic() >= self._deadline

    def __enter__(self) -> Self:
        # Or a scheduler with a short limit would restart a slow startup forever.
        self._deadline = max(self._deadline, time.monotonic() + MIN_TRAIN_SECONDS)
        self._depth += 1
        self._is_saved = False
        # Python allows signal handlers in the main thread only.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Under nohup SIGHUP is ignored, and has to stay so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SIGHUP:
            files.discard_terminal_output()
        elif not self._is_requested:
            self._is_requested, self._requested_at = True, time.monotonic()
        elif time.monotonic() - self._requested_at >= REPEAT_SECONDS:
            self._end_at_once(number)
        if self._signal is not None:
            # SIGHUP comes with SIGTERM from systemd, and twice from the kernel and the shell; of
            # two pending signals Python handles the lower number first.
            return
        # Only a flag: the loop saves between steps, where state and weights are consistent.
        self._signal = "interrupted" if number == signal.SIGINT else "terminated"
        logger.warning(SAVED_MESSAGE if self._is_saved else MESSAGE)

    def _end_at_once(self, number: int) -> NoReturn:
        if not self.exits_on_second:
            raise KeyboardInterrupt
        if sys.stdout.isatty():
            # The progress bar hid the cursor.
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
        os._exit(128 + number)


def agree_on_signal(stop_signal: StopSignal, comm: Comm) -> StopReason | None:
    """The signal that arrived on any of the ranks, the same on all of them; a collective."""
    priority = STOP_REASONS.index(stop_signal.stop_reason())
    reason = STOP_REASONS[-comm.all_reduce_min(-priority)]
    return None if reason == "time_limit" else reason
