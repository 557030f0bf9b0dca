"""Running a function on several gloo ranks, each a process of its own, forked from a warm one."""

import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from gptforge.distributed import init_distributed
from gptforge.errors import RunError, UserError

# A fork of this process would inherit autograd's threads half dead; a fresh start takes seconds.
_context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    _context.set_forkserver_preload(["gptforge.builders", "torch.distributed.fsdp", "matplotlib"])


def on_ranks(count: int, do: Callable[..., Any], *args: Any) -> list[Any]:
    """What `do(ranks, *args)` gives on each of `count` ranks, something for JSON."""
    with TemporaryDirectory() as folder:
        codes = _run(count, do, args, folder, {})
        for rank, code in enumerate(codes):
            if code != 0:
                pytest.fail(f"rank {rank}, exit code {code}: {_said(folder, rank)}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


@dataclass
class End:
    """How a rank ended."""

    code: int | None
    said: str


def ends_of_start(count: int, do: Callable[[int], Any], *, silence: float) -> list[End]:
    """How each rank ends, where `do(rank)` happens before it joins the others."""
    with TemporaryDirectory() as folder:
        env = {"GPTFORGE_SILENCE": silence}
        codes = _run(count, nothing, (), folder, env, before=do)
        return [End(code, _said(folder, rank)) for rank, code in enumerate(codes)]


def nothing(ranks: Any) -> None:
    """Nothing: a function that another process can be told of."""


def ends_of(count: int, do: Callable[..., Any], *args: Any, silence: float) -> list[End]:
    """How each rank ends, where something goes wrong on one of them."""
    with TemporaryDirectory() as folder:
        codes = _run(count, do, args, folder, {"GPTFORGE_SILENCE": silence})
        return [End(code, _said(folder, rank)) for rank, code in enumerate(codes)]


def _said(folder: str, rank: int) -> str:
    return (Path(folder) / f"{rank}.said").read_text()


def _run(
    count: int,
    do: Callable[..., Any],
    args: Any,
    folder: str,
    env: dict[str, Any],
    before: Callable[[int], Any] | None = None,
) -> list[int | None]:
    """Exit codes. When the first or two others have ended, those that do not follow are killed."""
    port = free_port()
    children = [
        _context.Process(target=_child, args=(rank, count, port, folder, do, args, env, before))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ended = [child.exitcode is not None for child in children]
        if ended[0] or sum(ended) > 1:
            break
        time.sleep(0.05)
    # One that is left alone is the lost one, which does not follow.
    deadline = time.monotonic() + 8
    last = time.monotonic() + 4
    while (left := [c for c in children if c.exitcode is None]) and time.monotonic() < deadline:
        if len(left) > 1:
            last = time.monotonic() + 4
        elif time.monotonic() > last:
            break
        time.sleep(0.05)
    for child in left:
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int,
    count: int,
    port: int,
    folder: str,
    do: Callable[..., Any],
    args: Any,
    env: Any,
    before: Callable[[int], Any] | None = None,
) -> None:
    said = os.open(Path(folder) / f"{rank}.said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    facts |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in (facts | env).items()})
    import torch

    torch.set_num_threads(1)
    try:
        if before is not None:
            before(rank)
        ranks = init_distributed("cpu")
    except (UserError, RunError) as error:
        print(f"error: {error}", flush=True)
        os._exit(2 if isinstance(error, UserError) else 1)
    try:
        result = do(ranks, *args)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
        ranks.shutdown()
    except BaseException as error:
        traceback.print_exc()
        ranks.abort(error)
