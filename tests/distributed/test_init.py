"""A rank that is lost before all have met is named by the others, and nobody waits for long."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from gptforge.distributed import (
    Comm,
    comm,
    init_distributed,
    watchdog,
)
from gptforge.distributed.watchdog import DEADLOCK_FACTOR, Watchdog
from gptforge.errors import UserError
from tests.distributed.spawn import End, ends_of, ends_of_start, free_port
from tests.environment import python_path

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
SILENCE = 3.0
"""Ranks wait for one and a half times as long."""
never: list[socket.socket] = []


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stops(rank: int) -> None:
    if rank == 1:
        freeze()


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)


def makes_a_mistake(rank: int) -> None:
    if rank == 1:
        raise UserError("--max_stepz is unknown")


def lacks_its_number(rank: int) -> None:
    if rank == 1:
        del os.environ["RANK"]


def lacks_the_number_of_all(rank: int) -> None:
    if rank == 1:
        del os.environ["WORLD_SIZE"]


def goes_elsewhere(rank: int) -> None:
    if rank == 1:
        os.environ["MASTER_PORT"] = "1"


def goes_to_a_port_that_never_answers(rank: int) -> None:
    if rank == 1:
        listening = socket.create_server(("localhost", 0))
        never.append(listening)
        os.environ["MASTER_PORT"] = str(listening.getsockname()[1])


def on_hosts_of_their_own(rank: int) -> None:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    socket.gethostname = lambda: f"host-{rank}"
    stops(rank)


def first_one_stops(rank: int) -> None:
    if rank == 0:
        freeze()


def first_one_stops_with_the_store(rank: int) -> None:
    if rank == 0:
        threading.Timer(2, freeze).start()
    if rank == 1:
        os._exit(9)


def stops_in_the_setup(rank: int) -> None:
    if rank == 1:
        dist.init_process_group = lambda *args, **more: freeze()


def is_there_twice(rank: int) -> None:
    if rank == 2:
        os.environ["RANK"] = "1"


def counts_the_others_differently(rank: int) -> None:
    if rank == 1:
        os.environ["WORLD_SIZE"] = "4"


ABSENT = [
    stops,
    dies,
    makes_a_mistake,
    lacks_its_number,
    lacks_the_number_of_all,
    goes_elsewhere,
    goes_to_a_port_that_never_answers,
]
RANK_0_LOST = [first_one_stops, first_one_stops_with_the_store]
OTHERS = [on_hosts_of_their_own, stops_in_the_setup, is_there_twice]
Ends = dict[object, Future[list[End]]]


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    """How three ranks end with each trouble. They mostly wait, so several run at once."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    with ThreadPoolExecutor(5) as pool:
        yield {
            trouble: pool.submit(ends_of_start, 3, trouble, silence=SILENCE)
            for trouble in ABSENT + OTHERS + RANK_0_LOST
        }


@pytest.mark.parametrize("trouble", ABSENT)
def test_absent_rank_is_named(ends: Ends, trouble) -> None:
    first, lost, other = ends[trouble].result()
    assert first.code == 1
    assert "rank 1 of 3 did not start within 4 seconds" in first.said
    assert other.code == 1
    if trouble in (makes_a_mistake, lacks_its_number, lacks_the_number_of_all):
        assert lost.code == 2
        assert "error: " in lost.said
    if trouble in (goes_elsewhere, goes_to_a_port_that_never_answers):
        assert lost.code == 1
        assert "cannot join the other ranks: rank 0 did not answer at localhost:" in lost.said
        assert "the same MASTER_ADDR and MASTER_PORT" in lost.said


def test_every_host_names_the_absent_rank(ends: Ends) -> None:
    first, _, other = ends[on_hosts_of_their_own].result()
    for end in (first, other):
        assert end.code == 1
        assert "error: rank 1 of 3 did not start within 4 seconds" in end.said


@pytest.mark.parametrize("trouble", RANK_0_LOST)
def test_lost_rank_0_is_named(ends: Ends, trouble) -> None:
    _, *others = ends[trouble].result()
    for other in others if trouble is first_one_stops else others[1:]:
        assert other.code == 1
        says = "rank 0 did not answer at" if trouble is first_one_stops else "cannot reach"
        assert says in other.said


def test_rank_lost_in_setup_is_named(ends: Ends) -> None:
    first, _, other = ends[stops_in_the_setup].result()
    assert first.code == other.code == 1
    assert "error: rank 1 on" in first.said
    assert "has given no sign of life for" in first.said


def test_duplicate_and_missing_rank(ends: Ends) -> None:
    three = ends[is_there_twice].result()
    said = "".join(end.said for end in three)
    assert "rank 2 of 3 did not start" in said
    assert 0 not in [end.code for end in three]


def test_ranks_that_count_differently_are_told_so() -> None:
    first, second = ends_of_start(2, counts_the_others_differently, silence=SILENCE)
    assert first.code == second.code == 2
    assert "error: WORLD_SIZE is 4 in rank 1, and 2 in rank 0" in first.said


def test_a_number_without_the_number_of_all_is_a_mistake() -> None:
    with pytest.raises(UserError, match="RANK is 1 but WORLD_SIZE is not set"):
        init_distributed("cpu", env={"RANK": "1"})


def hangs_before_the_first_step(own: Comm) -> None:
    # Preparing a text may take longer than any one wait for it.
    comm.STORE_WAIT = timedelta(seconds=0.5)
    if own.rank == 1:
        time.sleep(8)
    own.broadcast_from_rank0(lambda: None)
    own.assert_same({"text": "this"})
    own.all_true(True)


@LINUX
def test_a_rank_that_keeps_others_waiting_before_the_first_step_is_named() -> None:
    first, second = ends_of(2, hangs_before_the_first_step, silence=2)
    assert (first.code, second.code) == (0, 0)
    assert "the other ranks are waiting for rank 1 on" in first.said


def test_ranks_that_all_wait_for_each_other_before_the_first_step_end(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    own = Watchdog(0, world_size=2, host="here", store=None, is_local_main=True, timeout=30)

    def look(seconds: float, *, waits: int, waiting: int = 1, progress: int = 0) -> str | None:
        now[0] += seconds
        life = {"waiting": waiting, "waits": waits, "progress": progress, "host": "here"}
        return own._wait_before_first_step({0: life, 1: life})

    for waits in range(100):
        assert look(29 * DEADLOCK_FACTOR, waits=waits) is None
    assert look(9999, waits=99, waiting=0) is None
    assert look(9999, waits=99, progress=1) is None
    assert look(29 * DEADLOCK_FACTOR, waits=99) is None
    said = look(DEADLOCK_FACTOR, waits=99)
    assert said is not None
    assert "all 2 ranks have waited for each other for 120 seconds" in said


ABSENT_AT_FIRST = """
import os, time
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1":
    time.sleep(600)
"""


@LINUX
def test_torchrun_starts_again_where_a_rank_did_not_come(play, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABSENT_AT_FIRST)
    env = {"PYTHONPATH": python_path(tmp_path), "OMP_NUM_THREADS": "1", "GPTFORGE_SILENCE": "4"}
    launch = ["-m", "torch.distributed.run", f"--master_port={free_port()}",
              "--nproc_per_node=2", "--max_restarts=1"]  # fmt: skip
    train = ["--preset", "debug", "--device", "cpu", "--input", str(play), "--max_steps", "5",
             "--warmup_steps", "2", "--out_dir", "run", "--sample_every", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "gpt.py"), *train],
        cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: rank 1 of 2 did not start within 6 seconds" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-000005").is_dir()
