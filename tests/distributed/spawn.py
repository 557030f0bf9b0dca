"""Runs a function on several gloo ranks, each a process of `fork_server`."""

import itertools
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from gptforge.distributed import init_distributed
from gptforge.errors import RunError, UserError
from tests.fork_server import get_context
from tests.pictures import use_blank_pictures, use_short_samples

# Starting a process polls the exit codes of all others, and each can be read only once: two threads
# that poll the same one would see 255.
_poll_lock = threading.Lock()


@dataclass
class RankExit:
    """Exit code and output of a rank."""

    code: int | None
    output: str


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(comm, *args)` returns on each rank, which must be JSON."""
    with TemporaryDirectory() as folder:
        for rank, end in enumerate(_run(world_size, function, args, folder)):
            if end.code != 0:
                pytest.fail(f"rank {rank}, exit code {end.code}: {end.output}")
        results = [Path(folder) / f"{rank}.json" for rank in range(world_size)]
        return [json.loads(path.read_text()) for path in results]


def exits_of(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float
) -> list[RankExit]:
    """How each rank exits where something goes wrong in `function(comm, *args)`."""
    with TemporaryDirectory() as folder:
        return _run(world_size, function, args, folder, timeout=timeout)


def exits_of_start(
    world_size: int, function: Callable[[int], Any], *, timeout: float
) -> list[RankExit]:
    """How each rank exits where `function(rank)` runs before it joins the others."""
    with TemporaryDirectory() as folder:
        return _run(world_size, do_nothing, (), folder, timeout=timeout, before=function)


def do_nothing(comm: Any) -> None:
    """A function that another process can import."""


def _run(
    world_size: int,
    function: Callable[..., Any],
    args: Any,
    folder: str,
    *,
    timeout: float | None = None,
    before: Callable[[int], Any] | None = None,
) -> list[RankExit]:
    """Wait until all ranks have ended; those that have stopped themselves are killed then."""
    env = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    if timeout is not None:
        env["GPTFORGE_SILENCE"] = timeout
    context = get_context()
    children = [
        context.Process(target=_child, args=(rank, folder, function, args, env, before))
        for rank in range(world_size)
    ]
    for child in children:
        with _poll_lock:
            child.start()
    deadline = time.monotonic() + 200
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    with _poll_lock:
        for child in children:
            if child.exitcode is None:
                child.kill()
                child.join()
        codes = [child.exitcode for child in children]
    outputs = [(Path(folder) / f"{rank}.out").read_text() for rank in range(world_size)]
    return list(map(RankExit, codes, outputs))


def is_running(child: BaseProcess) -> bool:
    """Whether a rank has neither ended nor stopped itself by SIGSTOP, which only Linux shows."""
    with _poll_lock:
        if child.exitcode is not None:
            return False
    try:
        return Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2][0] != "T"
    except OSError:  # it has just ended, or there is no /proc
        return True


# From a place of this process's own, below the ports that systems give to any socket: so no other
# program gets one before the ranks do.
_ports = itertools.count(10_000 + os.getpid() * 7919 % 20_000)


def free_port() -> int:
    """A port that is free now, and that no test gets a second time."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port


def _child(
    rank: int,
    folder: str,
    function: Callable[..., Any],
    args: Any,
    env: Any,
    before: Callable[[int], Any] | None,
) -> None:
    output = os.open(Path(folder) / f"{rank}.out", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    env |= {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in env.items()})
    import torch

    torch.set_num_threads(1)
    use_blank_pictures()
    use_short_samples()
    # Ranks wait for each other for seconds, and a busy machine may start one later than that.
    (Path(folder) / f"{rank}.ready").touch()
    while len(list(Path(folder).glob("*.ready"))) < env["WORLD_SIZE"]:
        time.sleep(0.01)
    if rank:
        time.sleep(0.1)  # until rank 0 listens: a refused connection is only tried again much later
    try:
        if before is not None:
            before(rank)
        comm = init_distributed("cpu")
    except (UserError, RunError) as error:
        print(f"error: {error}", flush=True)
        os._exit(2 if isinstance(error, UserError) else 1)
    try:
        result = function(comm, *args)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
        comm.shutdown()
    except BaseException as error:
        traceback.print_exc()
        comm.abort(error)
