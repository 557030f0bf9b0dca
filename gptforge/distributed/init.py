"""Joining the other processes that torchrun has started, from what it says in the environment."""

import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from gptforge.device import has_mps
from gptforge.distributed.comm import SINGLE_PROCESS, Comm, DistributedComm
from gptforge.distributed.watchdog import EXIT_FAILURE, TIMEOUT, Watchdog
from gptforge.errors import RunError, UserError
from gptforge.shell import env_int

REQUIRED_ENV = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Timeout of a collective. Lost ranks are found by the heartbeat long before."""
GRACE_SECONDS = 3.0
"""Seconds after which a store that neither answers nor fails is given up."""
POLL_SECONDS = 0.05
"""Seconds between looks for the other ranks."""


def is_distributed_launch(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes."""
    return env_int("WORLD_SIZE", 1, env) > 1


def init_distributed(device: str, *, env: Mapping[str, str] = os.environ) -> Comm:
    """Meet the other processes; `ALONE` if there are none.

    NCCL carries what GPUs say to each other, gloo what CPUs do.

    Args:
        device: as `--device` has it.
        env: where torchrun has left its facts.

    Raises:
        UserError: if the launch does not fit together.
    """
    if not is_distributed_launch(env):
        if "RANK" in env and "WORLD_SIZE" not in env:
            raise UserError(
                f"RANK is {env['RANK']} but WORLD_SIZE is not set: start several processes with "
                "torchrun --nproc_per_node=N gpt.py ..., or unset RANK to train with one"
            )
        return SINGLE_PROCESS
    if missing := [name for name in REQUIRED_ENV if name not in env]:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} but {missing[0]} is not set: start several "
            "processes with torchrun --nproc_per_node=N gpt.py ..."
        )
    rank, size = _place(env, "RANK", "WORLD_SIZE")
    local_rank, local_size = _place(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not 0 < (port := env_int("MASTER_PORT", 0, env)) < 2**16:
        raise UserError(f"MASTER_PORT is {port}: give a port from 1 to 65535")
    place = _local_device(device, local_rank, local_size=local_size)
    host = socket.gethostname()
    silence = _seconds(env.get("GPTFORGE_SILENCE", str(TIMEOUT)))
    # Before all have met nobody listens for signs of life: a shorter wait stands in for them.
    patience = 1.5 * silence
    is_server = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    server_name = "rank 0" if rank else "the launcher's store"
    out_of_reach = (
        f"rank {rank} on {host} cannot join the other ranks: {server_name} did not answer at "
        f"{address} within {patience:.0f} seconds: see what was printed there, and whether all "
        "ranks have the same MASTER_ADDR and MASTER_PORT"
    )
    try:
        with _time_limit(patience + GRACE_SECONDS, out_of_reach):
            server = _store(env, is_server=is_server, timeout=timedelta(seconds=patience))
            own = _store(env, is_server=False, timeout=timedelta(seconds=silence))
            attempt = join_rendezvous(server, rank, size, patience) if rank else _new_name()
    except (RunError, UserError):
        raise
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0][:200]
        blame = f"cannot listen at {address}" if is_server else out_of_reach
        raise RunError(f"{blame} ({first})") from None
    heartbeat = Watchdog(
        rank,
        world_size=size,
        host=host,
        store=PrefixStore(attempt, own),
        is_local_main=local_rank == 0,
        timeout=silence,
        is_server=is_server,
    )
    try:
        heartbeat.start()
        if rank == 0:
            if wrong := host_rendezvous(server, attempt, size, patience):
                heartbeat.exit(*wrong)
            heartbeat.all_joined()
        # A rank 0 that serves the store answers as long as it lives; the heartbeat watches it.
        server.set_timeout(COLLECTIVE_TIMEOUT)
        store = PrefixStore(attempt, server)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        with heartbeat.wait_for_ranks():
            dist.init_process_group(
                "nccl" if place.type == "cuda" else "gloo",
                store=PrefixStore("torch", store),
                rank=rank,
                world_size=size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=place if place.type == "cuda" else None,
            )
    except BaseException as error:
        heartbeat.abort(error)
    return DistributedComm(
        rank,
        world_size=size,
        local_rank=local_rank,
        host=host,
        device=place,
        store=store,
        watchdog=heartbeat,
    )


def _place(env: Mapping[str, str], number: str, count: str) -> tuple[int, int]:
    """Which of how many: a number below its count."""
    which, of = env_int(number, 0, env), env_int(count, 1, env)
    if which >= of:
        raise UserError(f"{number} is {which} and {count} {of}: ranks are counted from 0")
    return which, of


@contextmanager
def _time_limit(seconds: float, text: str) -> Iterator[None]:
    """End this process with an error if the body takes longer.

    A request to a store that is frozen, or to another server at that port, never returns, and no
    timeout of torch's applies to it.
    """

    def end() -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILURE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"GPTFORGE_SILENCE={word}: give seconds, such as 120")
    return seconds


def _store(env: Mapping[str, str], *, is_server: bool, timeout: timedelta) -> Store:
    """A connection of its own to the launcher's store."""
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    return TCPStore(address, port, is_master=is_server, timeout=timeout)


def join_rendezvous(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """Have rank 0 tell the name of this attempt, under which the ranks meet in the store.

    The launcher's store outlives a restart, with all that was said before, and launchers count
    restarts each for itself. So every rank says hello with a word of its own, and waits until rank
    0 answers that very word.

    Args:
        store: the launcher's.
        rank: of this process, not 0.
        size: of all.
        patience: seconds to wait for rank 0.

    Raises:
        RunError: if rank 0 does not answer.
        UserError: if another process has the same rank.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"gptforge/hello/{rank}", word)
    key = f"gptforge/welcome/{rank}"
    while time.monotonic() < deadline:
        said, _, name = (store.get(key).decode() if store.check([key]) else "").partition(" ")
        if said == word:
            # Each process confirms once, so a second one of the same number shows.
            if store.add(f"{name}/count/{rank}", 1) > 1:
                raise UserError(f"RANK is {rank} in two processes of this launch")
            store.set(f"{name}/{rank}", str(world_size))
            return name
        time.sleep(POLL_SECONDS)
    raise RunError(_did_not_start([0], world_size, timeout))


def _new_name() -> str:
    """A name for an attempt to meet that no earlier one had."""
    return f"gptforge/{secrets.token_hex(8)}"


def host_rendezvous(
    store: Store, name: str, world_size: int, timeout: float
) -> tuple[str, int] | None:
    """On rank 0, answer the others until all have joined; else say what is wrong, and exit code."""
    deadline = time.monotonic() + timeout
    answered: dict[int, str] = {}
    others = range(1, world_size)
    while not store.check([f"{name}/{other}" for other in others]):
        if time.monotonic() > deadline:
            late = [other for other in others if not store.check([f"{name}/{other}"])]
            return _did_not_start(late, world_size, timeout), EXIT_FAILURE
        for other in others:
            key = f"gptforge/hello/{other}"
            hello = store.get(key).decode() if store.check([key]) else ""
            if hello and answered.get(other) != hello:
                store.set(f"gptforge/welcome/{other}", f"{hello} {name}")
                answered[other] = hello
        time.sleep(POLL_SECONDS)
    for other in others:
        if (theirs := store.get(f"{name}/{other}").decode()) != str(world_size):
            return f"WORLD_SIZE is {theirs} in rank {other}, and {world_size} in rank 0", 2
    return None


def _did_not_start(late: Sequence[int], size: int, patience: float) -> str:
    many = "s" * (len(late) > 1)
    return (
        f"rank{many} {', '.join(map(str, late))} of {size} did not start within {patience:.0f} "
        "seconds: see what was printed there; where starting takes longer, set GPTFORGE_SILENCE="
        f"{2 * patience:.0f}"
    )


def _local_device(flag: str, local_rank: int, *, local_size: int) -> torch.device:
    kind, _, index = flag.partition(":")
    if index or kind == "mps":
        raise UserError(f"--device {flag}: torchrun gives each rank its own; leave it out")
    if flag == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if flag == "auto" and has_mps():
            raise UserError("several processes train on CUDA GPUs or on CPUs: add --device cpu")
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if local_size > there:
        remedy = f"use --nproc_per_node={there}" if there else "add --device cpu"
        raise UserError(
            f"{local_size} ranks were started here and torch finds {there} CUDA GPUs: {remedy}"
        )
    return torch.device("cuda", local_rank)
