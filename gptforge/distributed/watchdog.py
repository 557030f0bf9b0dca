"""Who is missing: each rank says every second that it lives, and all hear it when one does not.

A rank that dies, stands still or is cut off leaves the others waiting for it, on a GPU without an
error. So each process has a thread that writes to the store of the launcher; rank 0 reads what all
have written, the others what rank 0 has. The first to find out, or to fail itself, leaves word, and
every rank ends on it. A network that is cut shows as a store that does not answer, which a second
thread notices.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from gptforge.errors import RunError, UserError
from gptforge.printable import print_stderr, printable

BEAT_INTERVAL = 1.0
"""Seconds between signs of life."""
TIMEOUT = 30.0
"""Seconds without one, after which a rank counts as lost."""
DEADLOCK_FACTOR = 4
"""Times as long may all ranks wait at once before the first step: connecting takes time."""
EXIT_FAILURE = 1
ABORT_KEY = "word"


class Watchdog:
    """The thread, and what it tells.

    Args:
        rank: of this process.
        size: of all.
        host: this machine's name.
        store: a connection of the thread's own: others' long waits must not hold it up.
        is_loudest: whether this rank prints what others have found, for its host.
        silence: seconds after which a rank counts as lost.
        is_server: whether the store ends with this process.
        leave: ends the process; a test's own does not.
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
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.progress = 0
        """Grows while this rank is getting on."""
        self.busy = 0
        """Above 0 while it does what the others have to wait for."""
        self.waiting = 0
        """Above 0 while it waits for another rank."""
        self.wait_count = 0
        """How often it has waited for another rank so far."""
        self._rank, self._size, self._host = rank, world_size, host
        self._where = f"rank {rank} on {host}"
        self._store, self._is_loudest, self._silence = store, is_local_main, timeout
        self._is_server, self._leave = is_server, exit_process
        self._ends = False
        self._quiet = threading.Event()
        self._others = _RankMonitor(timeout)
        self._heard = self._named = self._all_wait = time.monotonic()
        self._started = math.inf
        self._waits: list[int] = []
        self._threads = [
            threading.Thread(target=do, name="heartbeat", daemon=True)
            for do in (self._talk, self._watch)
        ]

    @contextmanager
    def wait_for_ranks(self) -> Iterator[None]:
        """Wait for other ranks in the body."""
        self.waiting += 1
        self.wait_count += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def start(self) -> None:
        """Begin to tell and to listen."""
        self._tell()
        self._heard = time.monotonic()
        if self._rank:
            self._started = self._heard
        for thread in self._threads:
            thread.start()

    def all_joined(self) -> None:
        """On rank 0: from now on each rank has to give signs of life."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """No more: the run is over.

        A thread that Python's end met in the middle of a question to the store would abort it.
        """
        self._quiet.set()
        for thread in self._threads:
            thread.join(self._silence)

    def abort(self, error: BaseException) -> NoReturn:
        """End this process for an error, and with it all the others."""
        if threading.current_thread() is threading.main_thread():
            # The launcher ends everybody at once; who is to blame has to be said first.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_connection_error(error):
            # Somebody else is to blame: the thread finds out who, and ends this process.
            time.sleep(self._silence + 10 * BEAT_INTERVAL)
        code = getattr(error, "code", None)
        if isinstance(error, UserError):
            code = 2
        text = " ".join(f"{error or type(error).__name__}".split())
        if isinstance(error, KeyboardInterrupt):
            code, text = 130, "interrupted"
        elif not isinstance(error, (UserError, RunError)):
            text = f"{type(error).__name__}: {text}"
        self.exit(
            f"{self._where}: {text}", code if isinstance(code, int) and code else EXIT_FAILURE
        )

    def exit(self, text: str, code: int) -> NoReturn:
        """Leave word, unless another rank has, and end this process."""
        self._ends = True
        word = {"text": text, "code": code, "host": self._host}
        try:
            left = post_abort(self._store, text, code, self._host)
        except (RuntimeError, ValueError):
            left = word
        if left == word:
            self._print(text)
            if self._is_server:
                # The others look once a second.
                time.sleep(2 * BEAT_INTERVAL)
            self._part(code)
        else:
            self._obey(left)
        raise AssertionError("a process that has ended")

    def _talk(self) -> None:
        """Tell and listen, until something is wrong or the run is over."""
        while not self._quiet.wait(BEAT_INTERVAL):
            try:
                found = self._look()
            except (RuntimeError, ValueError) as error:
                if _is_refused(error):
                    # There is nobody left: no need to wait.
                    self._heard -= self._silence
                continue
            self._heard = time.monotonic()
            if found and not self._quiet.is_set():
                self.exit(found, EXIT_FAILURE)

    def _watch(self) -> None:
        """End this rank when the store is silent: a question to it may then wait for ever."""
        while not self._quiet.wait(BEAT_INTERVAL):
            silent = time.monotonic() - self._heard
            if silent > self._silence:
                where = os.environ.get("MASTER_ADDR")
                self._print(
                    f"{self._where} cannot reach the other ranks, at {where}, any more: rank 0, "
                    "its machine or its launcher stands still or is gone, or the network"
                )
                self._part(EXIT_FAILURE)

    def _look(self) -> str | None:
        """Tell, and look around; gives what is wrong, in words."""
        if self._store.check([ABORT_KEY]) and not self._ends:
            self._obey(json.loads(self._store.get(ABORT_KEY)))
        own = self._tell()
        watched = range(1, self._size) if self._rank == 0 else [0]
        keys = [f"life/{other}" for other in watched]
        if not self._store.check(keys):
            # Some have only just met the others.
            silent = time.monotonic() - self._started
            gone = [n for n in watched if not self._store.check([f"life/{n}"])]
            if silent > self._silence and gone:
                return f"rank {gone[0]} has given no sign of life for {silent:.0f} seconds"
            return None
        lives = dict(zip(watched, map(json.loads, self._store.multi_get(keys)), strict=True))
        if self._rank == 0 and (deadlock := self._wait_before_first_step({0: own, **lives})):
            return deadlock
        return self._others.find_failure(lives, own if self._rank == 0 else None, self._host)

    def _wait_before_first_step(self, lives: Mapping[int, Mapping[str, Any]]) -> str | None:
        """Say now and then whom the others wait for, which may take long; give a deadlock."""
        late = [rank for rank, life in lives.items() if not life["waiting"]]
        waits = [life["waits"] for life in lives.values()]
        begun = min(int(life["progress"]) for life in lives.values()) > 0
        now = time.monotonic()
        if begun or late or waits != self._waits:
            self._waits, self._all_wait = waits, now
        if begun or not late or len(late) == len(lives):
            self._named = now
        elif now - self._named > self._silence:
            names = ", ".join(f"rank {rank} on {lives[rank]['host']}" for rank in late)
            seconds = now - self._started
            text = f"note: after {seconds:.0f} seconds the other ranks are waiting for {names}"
            print(text, file=sys.stderr, flush=True)
            self._named = now
        if (seconds := now - self._all_wait) < DEADLOCK_FACTOR * self._silence:
            return None
        return (
            f"all {self._size} ranks have waited for each other for {seconds:.0f} seconds: they "
            "live, but their data does not arrive. On several machines, GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names the network interface that reaches the others"
        )

    def _tell(self) -> dict[str, Any]:
        """Say that this rank lives."""
        own = {"pid": os.getpid(), "host": self._host, "busy": self.busy}
        own |= {"waiting": self.waiting, "waits": self.wait_count}
        own |= {"progress": self.progress, "beat": time.time()}
        self._store.set(f"life/{self._rank}", json.dumps(own))
        return own

    def _obey(self, word: Mapping[str, Any]) -> None:
        """End as another rank has said."""
        # Whoever left word has printed it, for its own machine.
        if self._is_loudest and word["host"] != self._host:
            self._print(word["text"])
        self._part(word["code"])

    def _print(self, text: str) -> None:
        print_stderr(f"error: {printable(text)}")

    def _part(self, code: int) -> None:
        """End the process; a save that is under way is finished first."""
        self._quiet.set()
        for thread in threading.enumerate():
            if thread.name == "saver":
                thread.join(20)
        sys.stdout.flush()
        self._leave(code)


def post_abort(store: Store, text: str, code: int, host: str) -> dict[str, Any]:
    """Tell all ranks to end with an error, unless one has already; gives what stands there now."""
    word = {"text": text, "code": code, "host": host}
    left: dict[str, Any] = json.loads(store.compare_set(ABORT_KEY, "", json.dumps(word)))
    return left


class _RankMonitor:
    """What is known of the other ranks, and since when nothing has changed."""

    def __init__(self, timeout: float) -> None:
        self._silence = timeout
        self._beats: dict[int, tuple[float, float]] = {}
        self._getting_on = time.monotonic()
        self._last: dict[int, int] = {}
        self._longest = 0.0

    def find_failure(
        self, lives: Mapping[int, Mapping[str, Any]], rank0: Mapping[str, Any] | None, host: str
    ) -> str | None:
        """Who has died or gone silent; with the `own` life of rank 0 also who stands still."""
        now = time.monotonic()
        for rank, life in lives.items():
            who = f"rank {rank} on {life['host']}"
            if life["host"] == host and not _is_alive(life["pid"]):
                return f"{who} has died (process {life['pid']})"
            beat, since = self._beats.get(rank, (None, now))
            if beat != life["beat"]:
                self._beats[rank] = (life["beat"], now)
            elif now - since > self._silence:
                return f"{who} has given no sign of life for {now - since:.0f} seconds"
        return self._standing_still({0: rank0, **lives}, now) if rank0 else None

    def _standing_still(self, lives: Mapping[int, Mapping[str, Any]], now: float) -> str | None:
        progress = {rank: int(life["progress"]) for rank, life in lives.items()}
        begun = min(progress.values()) > 0
        if progress != self._last or any(life["busy"] for life in lives.values()) or not begun:
            was_one_step = progress != self._last and self._last and min(self._last.values()) > 0
            if begun and was_one_step:
                self._longest = max(self._longest, now - self._getting_on)
            self._last, self._getting_on = progress, now
            return None
        still = now - self._getting_on
        # A slow machine is not one that hangs.
        if still < max(self._silence, 5 * self._longest):
            return None
        least = min(progress.values())
        behind = [r for r, p in progress.items() if p == least]
        if len(behind) == len(lives):
            return f"all ranks have stood still for {still:.0f} seconds"
        names = ", ".join(f"rank {r} on {lives[r]['host']}" for r in behind)
        return f"{names} stood still for {still:.0f} seconds while the others waited"


def is_connection_error(error: BaseException) -> bool:
    """Whether an error only says that another rank did not answer."""
    if isinstance(error, dist.DistError):
        return True
    words = ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo")
    is_plain = type(error) is RuntimeError or isinstance(error, torch.AcceleratorError)
    return is_plain and any(word in str(error) for word in words)


def _is_refused(error: BaseException) -> bool:
    """Whether there is nobody left where the store was."""
    return any(word in str(error) for word in ("refused", "Broken pipe", "reset by peer"))


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a dead one that nobody has fetched does not."""
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
