"""Finds ranks that died, hang or were cut off, and ends all others with an error that names them.

NCCL would leave them waiting on the GPU without an error. A thread of each rank writes a heartbeat
to the launcher's store every second; rank 0 reads those of all ranks, the others that of rank 0.
The first rank that finds a problem, or fails itself, posts an abort message that ends every rank.
A second thread notices a store that no longer answers, as when the network is cut.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from gptforge.errors import RunError, UserError, device_failure
from gptforge.printable import print_stderr, printable

BEAT_INTERVAL = 1.0  # seconds between heartbeats
TIMEOUT = 30.0
"""Seconds without a heartbeat, or without progress, after which a rank counts as lost."""
EXIT_FAILURE = 1
ABORT_KEY = "abort"
DEADLOCK_FACTOR = 4
"""All ranks may wait for each other for so many timeouts before step 1: connecting takes time."""

Heartbeats = Mapping[int, Mapping[str, Any]]  # the latest heartbeat by rank


class Watchdog:
    """The heartbeat threads of one rank.

    Args:
        rank: global rank, of `world_size`.
        host: name of this machine.
        store: a connection used by nothing else, as others block in long waits.
        is_local_main: whether this rank prints what ranks on other machines have found.
        timeout: seconds after which a rank counts as lost.
        is_server: whether the store ends with this process.
    """

    def __init__(
        self,
        rank: int,
        *,
        world_size: int,
        host: str,
        store: Store,
        is_local_main: bool,
        timeout: float = TIMEOUT,
        is_server: bool = False,
    ) -> None:
        self.progress = 0  # grows with each step of this rank
        self.busy = 0  # above 0 while other ranks may have to wait for this one
        self.waiting = 0  # above 0 while this rank waits for another one
        self.wait_count = 0  # such waits so far
        self._rank, self._world_size, self._host = rank, world_size, host
        self._label = f"rank {rank} on {host}"
        self._store, self._is_local_main, self._timeout = store, is_local_main, timeout
        self._is_server, self._is_aborting = is_server, False
        self._stopped = threading.Event()
        self._monitor = HeartbeatMonitor(timeout)
        self._last_answer = time.monotonic()
        self._threads = [
            threading.Thread(target=run, name="watchdog", daemon=True)
            for run in (self._beat, self._watch_store)
        ]

    @contextmanager
    def wait_for_ranks(self) -> Iterator[None]:
        """Mark the body as waiting for other ranks."""
        self.waiting += 1
        self.wait_count += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @contextmanager
    def pause_stall_check(self) -> Iterator[None]:
        """Mark the body as taking long while other ranks may be waiting."""
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self.progress += 1

    def start(self) -> None:
        """Send the first heartbeat and start the threads."""
        self._send_heartbeat()
        self._last_answer = time.monotonic()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop the threads at the end of a run."""
        self._stopped.set()
        # A thread inside a request to the store would abort an interpreter that shuts down.
        for thread in self._threads:
            thread.join(self._timeout)

    def abort(self, error: BaseException) -> NoReturn:
        """End this process, and through it all ranks, because of an error."""
        if threading.current_thread() is threading.main_thread():
            # torchrun terminates all ranks as soon as one fails; report the cause first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_connection_error(error):
            # Another rank is the cause: the threads find out which one and end this process.
            time.sleep(self._timeout + 10 * BEAT_INTERVAL)
        text = " ".join(f"{error or type(error).__name__}".split())
        code = getattr(error, "code", None)
        if isinstance(error, UserError):
            code = 2
        elif isinstance(error, KeyboardInterrupt):
            code, text = 130, ": ".join(["interrupted", *map(str, error.args)])
        elif isinstance(error, torch.AcceleratorError):
            text = device_failure(error)
        elif not isinstance(error, RunError):
            text = f"{type(error).__name__}: {text}"
        code = code if isinstance(code, int) and code else EXIT_FAILURE
        self.exit(f"{self._label}: {text}", code)

    def exit(self, text: str, code: int) -> NoReturn:
        """Post an abort message, unless another rank already has, and end this process."""
        self._is_aborting = True
        message = {"text": text, "code": code, "host": self._host}
        try:
            posted = json.loads(self._store.compare_set(ABORT_KEY, "", json.dumps(message)))
        except (RuntimeError, ValueError):
            posted = message
        if posted != message:
            self._exit_on_abort(posted)
        self._print_error(text)
        if self._is_server:
            # The other ranks read the store once a second.
            time.sleep(2 * BEAT_INTERVAL)
        self._exit(code)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_INTERVAL):
            try:
                problem = self._check()
            except (RuntimeError, ValueError) as error:
                if any(text in str(error) for text in ("refused", "Broken pipe", "reset by peer")):
                    # The store's server is gone: do not wait for the timeout.
                    self._last_answer -= self._timeout
                continue
            self._last_answer = time.monotonic()
            if problem and not self._stopped.is_set():
                self.exit(problem, EXIT_FAILURE)

    def _watch_store(self) -> None:
        """End this rank when the store stops answering; a request to it may then block forever."""
        while not self._stopped.wait(BEAT_INTERVAL):
            if time.monotonic() - self._last_answer > self._timeout:
                self._print_error(
                    f"{self._label} can no longer reach the other ranks at "
                    f"{os.environ.get('MASTER_ADDR')}: rank 0, its machine or its launcher hangs "
                    "or has ended, or the network is down"
                )
                self._exit(EXIT_FAILURE)

    def _check(self) -> str | None:
        """Send a heartbeat and read those of other ranks; returns a problem as text."""
        if self._store.check([ABORT_KEY]) and not self._is_aborting:
            self._exit_on_abort(json.loads(self._store.get(ABORT_KEY)))
        local = self._send_heartbeat()
        watched = range(1, self._world_size) if self._rank == 0 else [0]
        keys = [f"life/{rank}" for rank in watched]
        if not self._store.check(keys):
            return None  # rank 0 still waits for ranks to join, and names those that do not
        beats = dict(zip(watched, map(json.loads, self._store.multi_get(keys)), strict=True))
        problem = self._monitor.find_lost(beats, self._host)
        return problem if self._rank else problem or self._monitor.find_stall({0: local, **beats})

    def _send_heartbeat(self) -> dict[str, Any]:
        beat = {"pid": os.getpid(), "host": self._host, "beat": time.time()} | {
            name: getattr(self, name) for name in ("busy", "waiting", "wait_count", "progress")
        }
        self._store.set(f"life/{self._rank}", json.dumps(beat))
        return beat

    def _exit_on_abort(self, message: Mapping[str, Any]) -> NoReturn:
        # The rank that posted the message has printed it on its own machine.
        if self._is_local_main and message["host"] != self._host:
            self._print_error(message["text"])
        self._exit(message["code"])

    def _print_error(self, text: str) -> None:
        print_stderr(f"error: {printable(text)}")

    def _exit(self, code: int) -> NoReturn:
        """End the process once a running save is complete."""
        self._stopped.set()
        for thread in threading.enumerate():
            if thread.name == "saver":
                thread.join(20)
        sys.stdout.flush()
        os._exit(code)


def is_connection_error(error: BaseException) -> bool:
    """Whether an error only says that another rank did not answer."""
    if isinstance(error, dist.DistError):
        return True
    texts = ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo")
    is_plain = type(error) is RuntimeError or isinstance(error, torch.AcceleratorError)
    return is_plain and any(text in str(error) for text in texts)


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

        Preparing a text may take long, so before the first step it is no failure to wait for a rank
        that is alive; a note says from time to time which one the others wait for.
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
            "they are alive, but receive no data. On several machines, GLOO_SOCKET_IFNAME or "
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
