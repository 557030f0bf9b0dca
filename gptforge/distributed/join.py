"""Joining the other processes that torchrun has started, from what it says in the environment."""

import math
import os
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from gptforge.distributed.heartbeat import SILENCE, Heartbeat, leave_word
from gptforge.distributed.ranks import ALONE, ManyRanks, Ranks
from gptforge.errors import RunError, UserError
from gptforge.hardware import has_mps
from gptforge.launch_env import env_int

WANTED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = timedelta(minutes=30)
"""That a rank waits for others. Lost ones are found by the heartbeat long before."""


def is_launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is one of several processes."""
    return env_int("WORLD_SIZE", 1, env) > 1


def join(device: str, *, env: Mapping[str, str] = os.environ) -> Ranks:
    """Meet the other processes; `ALONE` if there are none.

    NCCL carries what GPUs say to each other, gloo what CPUs do.

    Args:
        device: as `--device` has it.
        env: where torchrun has left its facts.

    Raises:
        UserError: if the launch does not fit together.
    """
    if not is_launched(env):
        return ALONE
    if missing := [name for name in WANTED if name not in env]:
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
    silence = _seconds(env.get("GPTFORGE_SILENCE", str(SILENCE)))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    # Before all have met nobody listens for signs of life: a shorter wait stands in for them.
    patience = 1.5 * silence
    is_server = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = _store(env, is_server=is_server, timeout=timedelta(seconds=patience))
        attempt = meet(server, rank, size, host=host, patience=patience)
        server.set_timeout(LONGEST)
        store = PrefixStore(attempt, server)
        own = _store(env, is_server=False, timeout=timedelta(seconds=silence))
        heartbeat = Heartbeat(
            rank,
            size=size,
            host=host,
            store=PrefixStore(attempt, own),
            is_loudest=local_rank == 0,
            silence=silence,
        )
        heartbeat.start()
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            store=PrefixStore("torch", store),
            rank=rank,
            world_size=size,
            timeout=LONGEST,
            device_id=place if place.type == "cuda" else None,
        )
    except (dist.DistError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise RunError(f"rank {rank} on {host} cannot join the other ranks: {first}") from None
    return ManyRanks(
        rank,
        size=size,
        local_rank=local_rank,
        host=host,
        device=place,
        store=store,
        heartbeat=heartbeat,
    )


def _place(env: Mapping[str, str], number: str, count: str) -> tuple[int, int]:
    """Which of how many: a number below its count."""
    which, of = env_int(number, 0, env), env_int(count, 1, env)
    if which >= of:
        raise UserError(f"{number} is {which} and {count} {of}: ranks are counted from 0")
    return which, of


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


def meet(store: Store, rank: int, size: int, *, host: str = "", patience: float = 60.0) -> str:
    """Find the other ranks; gives a name for this meeting that no earlier one had.

    The launcher's store outlives a restart, with all that was said before, and launchers count
    restarts each for itself. So every rank says hello with a word of its own, and waits until rank
    0 answers that very word.

    Args:
        store: the launcher's.
        rank: of this process.
        size: of all.
        host: this machine's name.
        patience: seconds to wait for the others.

    Raises:
        RunError: if a rank does not come. Those that have come by then are told.
    """
    word, deadline = secrets.token_hex(8), time.monotonic() + patience
    store.set(f"gptforge/hello/{rank}", word)
    answered: dict[int, str] = {}
    while time.monotonic() < deadline:
        if rank == 0:
            for other in range(1, size):
                key = f"gptforge/hello/{other}"
                hello = store.get(key).decode() if store.check([key]) else ""
                if hello and answered.get(other) != hello:
                    store.set(f"gptforge/welcome/{other}", f"{hello} {word}")
                    answered[other] = hello
            if size == 1 or store.check([f"gptforge/{word}/{other}" for other in range(1, size)]):
                return f"gptforge/{word}"
        elif store.check([key := f"gptforge/welcome/{rank}"]):
            said, _, name = store.get(key).decode().partition(" ")
            if said == word:
                store.set(f"gptforge/{name}/{rank}", "here")
                return f"gptforge/{name}"
        time.sleep(0.05)
    late = [0]
    if rank == 0:
        late = [n for n in range(1, size) if not store.check([f"gptforge/{word}/{n}"])]
    many = "s" * (len(late) > 1)
    text = (
        f"rank{many} {', '.join(map(str, late))} of {size} did not start within {patience:.0f} "
        "seconds: see what was printed there; where starting takes longer, set GPTFORGE_SILENCE="
        f"{2 * patience:.0f}"
    )
    if rank == 0:
        leave_word(PrefixStore(f"gptforge/{word}", store), text, code=1, host=host)
    raise RunError(text)


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
