"""What the heartbeats of all ranks say: which one died, went silent, hangs or blocks the others."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptforge.printable import print_stderr

Heartbeat = Mapping[str, Any]

DEADLOCK_FACTOR = 4
"""All ranks may wait for each other for so many timeouts before step 1: connecting takes time."""


class HeartbeatMonitor:
    """The latest heartbeats of other ranks, and since when they have not changed.

    Args:
        timeout: seconds after which a rank counts as lost.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._longest_step = timeout, 0.0
        self._beats: dict[int, tuple[float, float]] = {}
        self._progress: dict[int, int] = {}
        self._wait_counts: list[int] = []
        self._last_change = self._last_wait = self._last_note = time.monotonic()

    def find_failure(
        self, beats: Mapping[int, Heartbeat], rank0: Heartbeat | None, host: str
    ) -> str | None:
        """A rank that died or went silent; on rank 0, given `rank0`, also ranks that stall."""
        now = time.monotonic()
        for rank, beat in beats.items():
            label = f"rank {rank} on {beat['host']}"
            if beat["host"] == host and not _is_alive(beat["pid"]):
                return f"{label} has died (process {beat['pid']})"
            last, since = self._beats.get(rank, (None, now))
            if last != beat["beat"]:
                self._beats[rank] = (beat["beat"], now)
            elif now - since > self._timeout:
                return f"{label} has sent no heartbeat for {now - since:.0f} seconds"
        return self._find_stall({0: rank0, **beats}, now) if rank0 else None

    def _find_stall(self, beats: Mapping[int, Heartbeat], now: float) -> str | None:
        progress = {rank: int(beat["progress"]) for rank, beat in beats.items()}
        previous, self._progress = self._progress, progress
        is_busy = any(beat["busy"] for beat in beats.values())
        if progress != previous or is_busy or not min(progress.values()):
            if progress != previous and min(previous.values(), default=0) > 0:
                self._longest_step = max(self._longest_step, now - self._last_change)
            self._last_change = now
            return None
        stalled = now - self._last_change
        # Steps of a slow machine may take longer than the timeout.
        if stalled < max(self._timeout, 5 * self._longest_step):
            return None
        behind = [rank for rank, p in progress.items() if p == min(progress.values())]
        if len(behind) == len(beats):
            return f"all ranks have stalled for {stalled:.0f} seconds"
        names = ", ".join(f"rank {rank} on {beats[rank]['host']}" for rank in behind)
        return f"{names} stalled for {stalled:.0f} seconds while the others waited"

    def find_deadlock(self, beats: Mapping[int, Heartbeat], *, since: float) -> str | None:
        """A deadlock before the first step; prints now and then which ranks the others wait for.

        Preparing a text may take long, so waiting for a rank that lives is no failure.

        Args:
            beats: of all ranks.
            since: when all of them had joined.
        """
        late = [rank for rank, beat in beats.items() if not beat["waiting"]]
        counts = [beat["wait_count"] for beat in beats.values()]
        started = min(int(beat["progress"]) for beat in beats.values()) > 0
        now = time.monotonic()
        if started or late or counts != self._wait_counts:
            self._wait_counts, self._last_wait = counts, now
        if started or not late or len(late) == len(beats):
            self._last_note = now
        elif now - self._last_note > self._timeout:
            names = ", ".join(f"rank {rank} on {beats[rank]['host']}" for rank in late)
            print_stderr(
                f"note: after {now - since:.0f} seconds the other ranks are waiting for {names}"
            )
            self._last_note = now
        seconds = now - self._last_wait
        if seconds < DEADLOCK_FACTOR * self._timeout:
            return None
        return (
            f"all {len(beats)} ranks have waited for each other for {seconds:.0f} seconds: "
            "they live, but their data does not arrive. On several machines, GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network interface that reaches the others"
        )


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2]
        return not after_name.split()[0].startswith(("Z", "X"))
    except (OSError, IndexError):
        return True
