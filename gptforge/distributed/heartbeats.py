"""What the heartbeats of all ranks say: which one died, went silent, hangs or blocks the others."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptforge.printable import print_stderr

Heartbeats = Mapping[int, Mapping[str, Any]]  # the latest heartbeat by rank

DEADLOCK_FACTOR = 4
"""All ranks may wait for each other for so many timeouts before step 1: connecting takes time."""


class HeartbeatMonitor:
    """Remembers since when heartbeats have not changed; after `timeout` seconds a rank is lost."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._longest_step = timeout, 0.0
        self._beats: dict[int, tuple[float, float]] = {}
        self._state: tuple[bool, list[int]] = (False, [])
        self._start = self._last_change = self._last_note = time.monotonic()

    def find_lost(self, beats: Heartbeats, host: str) -> str | None:
        """A rank that died, if it is on this host, or went silent."""
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
        return None

    def find_stall(self, beats: Heartbeats) -> str | None:
        """Ranks that hang, or before the first step a deadlock, given the heartbeats of all.

        Preparing a text may take long, so before the first step waiting for a rank that lives is no
        failure; a note says now and then which one the others wait for.
        """
        now = time.monotonic()
        progress = [int(beat["progress"]) for beat in beats.values()]
        wait_counts = [int(beat["wait_count"]) for beat in beats.values()]
        started = min(progress) > 0
        state = (started, progress if started else wait_counts)
        if started:
            busy = [rank for rank, beat in beats.items() if beat["busy"]]
        else:  # a rank that does not wait may be preparing the text
            busy = [rank for rank, beat in beats.items() if not beat["waiting"]]
        if started and self._state[0] and state != self._state:
            self._longest_step = max(self._longest_step, now - self._last_change)
        if busy or state != self._state:
            self._state, self._last_change = state, now
        idle = now - self._last_change
        if started:
            # Steps of a slow machine may take longer than the timeout.
            if idle < max(self._timeout, 5 * self._longest_step):
                return None
            behind = [r for r, beat in beats.items() if beat["progress"] == min(progress)]
            if len(behind) == len(beats):
                return f"all ranks have stalled for {idle:.0f} seconds"
            names = _names(behind, beats)
            return f"{names} stalled for {idle:.0f} seconds while the others waited"
        if not busy or len(busy) == len(beats):
            self._last_note = now
        elif now - self._last_note > self._timeout:
            self._last_note, seconds = now, f"{now - self._start:.0f} seconds"
            names = _names(busy, beats)
            print_stderr(f"note: after {seconds} the other ranks are waiting for {names}")
        if idle < DEADLOCK_FACTOR * self._timeout:
            return None
        return (
            f"all {len(beats)} ranks have waited for each other for {idle:.0f} seconds: "
            "they live, but their data does not arrive. On several machines, GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network interface that reaches the others"
        )


def _names(ranks: list[int], beats: Heartbeats) -> str:
    return ", ".join(f"rank {rank} on {beats[rank]['host']}" for rank in ranks)


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
    try:
        os.kill(pid, 0)
        # Without /proc, a zombie counts as alive.
        after_name = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2]
        return not after_name.split()[0].startswith(("Z", "X"))
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True
