"""Joins the processes that torchrun started, as its environment variables describe them."""

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from gptforge.distributed.comm import SINGLE_PROCESS, Comm, Group
from gptforge.distributed.watchdog import EXIT_FAILURE, TIMEOUT, Watchdog
from gptforge.errors import NOTHING_LOST, RunError, UserError, error_reason, first_line
from gptforge.printable import print_stderr
from gptforge.shell import env_int

REQUIRED_ENV = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # the watchdog finds lost ranks long before
GRACE_SECONDS = 3.0
"""How much longer than its timeout a store may take that neither answers nor fails."""
POLL_SECONDS = 0.05


def init_distributed(device: str, *, env: Mapping[str, str] = os.environ) -> Comm:
    """Join the other ranks and start the watchdog; `SINGLE_PROCESS` without a launcher.

    The backend is NCCL for GPUs and gloo for CPUs.

    Args:
        device: value of `--device`.
        env: set by torchrun; a UserError if its variables contradict each other.
    """
    if env_int("WORLD_SIZE", 1, env) <= 1:
        if "RANK" in env and ("WORLD_SIZE" not in env or env_int("RANK", 0, env)):
            size = env.get("WORLD_SIZE", "not set")
            raise UserError(
                f"RANK is {env['RANK']} but WORLD_SIZE is {size}: start several processes with "
                "torchrun --nproc_per_node=N gpt.py ..., or unset RANK to train with one"
            )
        return SINGLE_PROCESS
    if missing := [name for name in REQUIRED_ENV if name not in env]:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} but {missing[0]} is not set: start several "
            "processes with torchrun --nproc_per_node=N gpt.py ..."
        )
    rank, world_size = _rank_and_size(env, "RANK", "WORLD_SIZE")
    local_rank, local_world_size = _rank_and_size(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    address, port = env["MASTER_ADDR"], env_int("MASTER_PORT", 0, env)
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port}: give a port from 1 to 65535")
    local_device = _local_device(device, local_rank, local_world_size=local_world_size)
    host = socket.gethostname()
    timeout = _parse_timeout(env.get("GPTFORGE_SILENCE", str(TIMEOUT)))
    # Heartbeats are read once all ranks have joined; until then this shorter wait replaces them.
    join_timeout = 1.5 * timeout
    is_server = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    server_name = "rank 0" if rank else "the launcher's store"
    unreachable = (
        f"rank {rank} on {host} cannot join the other ranks: {server_name} did not answer at "
        f"{address}:{port} within {join_timeout:.0f} seconds: see what was printed there, and "
        "whether all ranks have the same MASTER_ADDR and MASTER_PORT"
    )

    attempt = f"gptforge/{secrets.token_hex(8)}"
    try:
        with _exit_after(join_timeout + GRACE_SECONDS, unreachable):
            if not is_server:
                _wait_until_listening(address, port, join_timeout)
            limit = timedelta(seconds=join_timeout)
            server = TCPStore(address, port, is_master=is_server, timeout=limit)
            limit = timedelta(seconds=timeout)
            watchdog_store = TCPStore(address, port, is_master=False, timeout=limit)
            if rank:
                attempt = join_rendezvous(server, rank, world_size, join_timeout)
    except RunError:
        raise
    except RuntimeError as error:
        problem = f"cannot listen at {address}:{port}" if is_server else unreachable
        raise RunError(f"{problem} ({first_line(error)})") from None
    watchdog = Watchdog(
        rank, world_size=world_size, host=host, store=PrefixStore(attempt, watchdog_store),
        is_local_main=local_rank == 0, timeout=timeout, is_server=is_server,
    )  # fmt: skip
    try:
        watchdog.start()
        if rank == 0 and (failure := host_rendezvous(server, attempt, world_size, join_timeout)):
            watchdog.exit(*failure)
        # A rank 0 that serves the store answers as long as it is alive; the watchdog checks on it.
        server.set_timeout(COLLECTIVE_TIMEOUT)
        store = PrefixStore(attempt, server)
        gpu = local_device if local_device.type == "cuda" else None
        if gpu is not None:
            torch.cuda.set_device(gpu)
        with watchdog.wait_for_ranks():
            dist.init_process_group(
                "nccl" if gpu else "gloo", store=PrefixStore("torch", store), rank=rank,
                world_size=world_size, timeout=COLLECTIVE_TIMEOUT, device_id=gpu,
            )  # fmt: skip
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error.args = (NOTHING_LOST,)
        watchdog.abort(error)
    return Comm(Group(rank, world_size, local_rank, host, local_device, store, watchdog))


def _wait_until_listening(address: str, port: int, timeout: float) -> None:
    """Wait for a server there; torch's own attempts print pages of C++ frames if there is none.

    Raises:
        RuntimeError: with the reason, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        remaining = max(deadline - time.monotonic(), POLL_SECONDS)
        try:
            socket.create_connection((address, port), remaining).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(error_reason(error)) from error
        time.sleep(POLL_SECONDS)


def join_rendezvous(store: Store, rank: int, world_size: int, timeout: float) -> str:
    """Join rank 0 through the launcher's store; returns the key prefix of this attempt.

    The launcher's store outlives a restart, with all keys of earlier attempts, and launchers on
    several machines count restarts independently. So every rank posts a random token and waits
    until rank 0 answers with the same token and the prefix, for `timeout` seconds.
    """
    token, deadline = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"gptforge/hello/{rank}", token)
    key = f"gptforge/welcome/{rank}"
    while time.monotonic() < deadline:
        answer = store.get(key).decode() if store.check([key]) else ""
        answered, _, attempt = answer.partition(" ")
        if answered == token:
            # Each process counts once, which reveals two of the same rank.
            if store.add(f"{attempt}/count/{rank}", 1) > 1:
                raise UserError(f"RANK is {rank} in two processes of this launch")
            store.set(f"{attempt}/{rank}", str(world_size))
            return attempt
        time.sleep(POLL_SECONDS)
    raise RunError(_did_not_start([0], world_size, timeout))


def host_rendezvous(
    store: Store, attempt: str, world_size: int, timeout: float
) -> tuple[str, int] | None:
    """On rank 0, answer the others until all have joined; returns an error and its exit code."""
    deadline = time.monotonic() + timeout
    answered: dict[int, str] = {}
    others = range(1, world_size)
    while not store.check([f"{attempt}/life/{rank}" for rank in others]):
        if time.monotonic() > deadline:
            late = [rank for rank in others if not store.check([f"{attempt}/life/{rank}"])]
            return _did_not_start(late, world_size, timeout), EXIT_FAILURE
        for rank in others:
            key = f"gptforge/hello/{rank}"
            token = store.get(key).decode() if store.check([key]) else ""
            if token and answered.get(rank) != token:
                store.set(f"gptforge/welcome/{rank}", f"{token} {attempt}")
                answered[rank] = token
        time.sleep(POLL_SECONDS)
    for rank in others:
        if (size := store.get(f"{attempt}/{rank}").decode()) != str(world_size):
            return f"WORLD_SIZE is {size} in rank {rank}, and {world_size} in rank 0", 2
    return None


def _parse_timeout(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise UserError(f"GPTFORGE_SILENCE={text}: give seconds, such as 120")


def _did_not_start(late: Sequence[int], world_size: int, timeout: float) -> str:
    plural = "s" * (len(late) > 1)
    return (
        f"rank{plural} {', '.join(map(str, late))} of {world_size} did not start within "
        f"{timeout:.0f} seconds: see what was printed there; if starting takes longer, set "
        f"GPTFORGE_SILENCE={2 * timeout:.0f}"
    )


def _rank_and_size(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = env_int(rank_name, 0, env), env_int(size_name, 1, env)
    if rank >= size:
        raise UserError(f"{rank_name} is {rank} and {size_name} {size}: ranks are counted from 0")
    return rank, size


@contextmanager
def _exit_after(seconds: float, message: str) -> Iterator[None]:
    """End this process with an error if the body takes longer.

    A request to a store that is frozen, or to another kind of server at that port, never returns,
    and no timeout of torch applies to it.
    """

    def exit_process() -> None:
        print_stderr(f"error: {message}")
        os._exit(EXIT_FAILURE)

    timer = threading.Timer(seconds, exit_process)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _local_device(flag: str, local_rank: int, *, local_world_size: int) -> torch.device:
    kind, _, index = flag.partition(":")
    if index or kind == "mps":
        raise UserError(f"--device {flag}: torchrun assigns each rank a device; leave it out")
    if flag == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu":
        if flag == "auto" and torch.backends.mps.is_available():
            raise UserError("several processes train on CUDA GPUs or on CPUs: add --device cpu")
        return torch.device("cpu")
    available = torch.cuda.device_count()
    if local_world_size > available:
        hint = f"use --nproc_per_node={available}" if available else "add --device cpu"
        raise UserError(
            f"{local_world_size} ranks were started here and torch finds {available} CUDA GPUs: "
            f"{hint}"
        )
    return torch.device("cuda", local_rank)
