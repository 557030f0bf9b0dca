"""Ranks that do not join are named by the others, which do not wait for long."""

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
import torch
import torch.distributed as dist
from torch.distributed import Store

from gptforge.cli import main
from gptforge.distributed import (
    Comm,
    comm,
    init,
    init_distributed,
    watchdog,
)
from gptforge.distributed.init import _local_device
from gptforge.distributed.watchdog import DEADLOCK_FACTOR, HeartbeatMonitor
from gptforge.errors import UserError
from tests.distributed.spawn import RankExit, exits_of, exits_of_start, free_port
from tests.environment import python_path
from tests.programs import command

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
TIMEOUT = 4.0
"""Ranks wait for one and a half times as long."""
sockets: list[socket.socket] = []


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def rank1_stops(rank: int) -> None:
    if rank == 1:
        freeze()


def rank1_dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)


def rank1_raises(rank: int) -> None:
    if rank == 1:
        raise UserError("--max_stepz is unknown")


def rank1_lacks_rank(rank: int) -> None:
    if rank == 1:
        del os.environ["RANK"]


def rank1_lacks_world_size(rank: int) -> None:
    if rank == 1:
        del os.environ["WORLD_SIZE"]


def rank1_connects_elsewhere(rank: int) -> None:
    if rank == 1:
        os.environ["MASTER_PORT"] = "1"


def rank1_connects_to_a_silent_port(rank: int) -> None:
    if rank == 1:
        sockets.append(socket.create_server(("localhost", 0)))
        os.environ["MASTER_PORT"] = str(sockets[0].getsockname()[1])


def rank1_stops_on_another_host(rank: int) -> None:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    socket.gethostname = lambda: f"host-{rank}"
    rank1_stops(rank)


def rank0_stops(rank: int) -> None:
    if rank == 0:
        freeze()


def rank0_stops_with_the_store(rank: int) -> None:
    if rank == 1:
        os._exit(9)
    host_rendezvous = init.host_rendezvous

    def host_and_freeze(store: Store, attempt: str, *args) -> tuple[str, int] | None:
        def freeze_later() -> None:
            while not store.check([f"{attempt}/life/2"]):  # its first heartbeat
                time.sleep(0.05)
            freeze()

        threading.Thread(target=freeze_later, daemon=True).start()
        return host_rendezvous(store, attempt, *args)

    if rank == 0:
        init.host_rendezvous = host_and_freeze


def rank1_stops_in_setup(rank: int) -> None:
    if rank == 1:
        dist.init_process_group = lambda *args, **options: freeze()


def rank2_claims_rank1(rank: int) -> None:
    if rank == 2:
        os.environ["RANK"] = "1"


def rank1_has_another_world_size(rank: int) -> None:
    if rank == 1:
        os.environ["WORLD_SIZE"] = "4"


ABSENT = [
    rank1_stops,
    rank1_dies,
    rank1_raises,
    rank1_lacks_rank,
    rank1_lacks_world_size,
    rank1_connects_elsewhere,
    rank1_connects_to_a_silent_port,
]
RANK0_LOST = [rank0_stops, rank0_stops_with_the_store]
OTHERS = [rank1_stops_on_another_host, rank1_stops_in_setup, rank2_claims_rank1]
Exits = dict[object, Future[list[RankExit]]]


@pytest.fixture(scope="module")
def exits() -> Iterator[Exits]:
    """How three ranks exit with each fault. They mostly wait, so several run at once."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    faults = ABSENT + OTHERS + RANK0_LOST
    with ThreadPoolExecutor(6) as pool:
        yield {fault: pool.submit(exits_of_start, 3, fault, timeout=TIMEOUT) for fault in faults}


@pytest.mark.parametrize("fault", ABSENT)
def test_absent_rank_is_named(exits: Exits, fault) -> None:
    first, lost, other = exits[fault].result()
    assert first.code == 1
    assert "rank 1 of 3 did not start within 6 seconds" in first.output
    assert other.code == 1
    if fault in (rank1_raises, rank1_lacks_rank, rank1_lacks_world_size):
        assert lost.code == 2
        assert "error: " in lost.output
    if fault in (rank1_connects_elsewhere, rank1_connects_to_a_silent_port):
        assert lost.code == 1
        assert "cannot join the other ranks: rank 0 did not answer at localhost:" in lost.output
        assert "the same MASTER_ADDR and MASTER_PORT" in lost.output
        assert "frame #" not in lost.output


def test_every_host_names_the_absent_rank(exits: Exits) -> None:
    first, _, other = exits[rank1_stops_on_another_host].result()
    for end in (first, other):
        assert end.code == 1
        assert "error: rank 1 of 3 did not start within 6 seconds" in end.output


@pytest.mark.parametrize("fault", RANK0_LOST)
def test_lost_rank0_is_named(exits: Exits, fault) -> None:
    _, *others = exits[fault].result()
    for other in others if fault is rank0_stops else others[1:]:
        assert other.code == 1
        message = "rank 0 did not answer at" if fault is rank0_stops else "can no longer reach"
        assert message in other.output


def test_rank_lost_in_setup_is_named(exits: Exits) -> None:
    first, _, other = exits[rank1_stops_in_setup].result()
    assert first.code == other.code == 1
    assert "error: rank 1 on" in first.output
    assert "has sent no heartbeat for" in first.output


def test_duplicate_and_missing_rank(exits: Exits) -> None:
    ranks = exits[rank2_claims_rank1].result()
    output = "".join(rank.output for rank in ranks)
    assert "rank 2 of 3 did not start" in output
    assert 0 not in [rank.code for rank in ranks]


def test_different_world_sizes_are_reported() -> None:
    first, second = exits_of_start(2, rank1_has_another_world_size, timeout=TIMEOUT)
    assert first.code == second.code == 2
    assert "error: WORLD_SIZE is 4 in rank 1, and 2 in rank 0" in first.output


def wait_before_first_step(ranks: Comm) -> None:
    # Preparing a text may take longer than any one wait for it.
    comm.STORE_WAIT = timedelta(seconds=0.5)
    if ranks.rank == 1:
        output = Path("/proc/self/fd/1").resolve().with_name("0.out")
        deadline = time.monotonic() + 60
        while "are waiting for rank 1" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
    ranks.broadcast_from_rank0(lambda: None)
    ranks.assert_same({"text": "this"})
    ranks.all_true(True)


@needs_linux
def test_slow_rank_before_the_first_step_is_named() -> None:
    first, second = exits_of(2, wait_before_first_step, timeout=2 * TIMEOUT)
    assert (first.code, second.code) == (0, 0)
    assert "the other ranks are waiting for rank 1 on" in first.output


def test_deadlock_before_the_first_step_is_found(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monitor = HeartbeatMonitor(timeout=30)

    def check(seconds: float, *, waits: int, waiting: int = 1, progress: int = 0) -> str | None:
        now[0] += seconds
        beat = {"waiting": waiting, "wait_count": waits, "progress": progress, "host": "here"}
        return monitor.find_stall(dict.fromkeys((0, 1), beat | {"busy": progress}))

    for waits in range(100):
        assert check(29 * DEADLOCK_FACTOR, waits=waits) is None
    assert check(9999, waits=99, progress=1) is None
    assert check(9999, waits=99, waiting=0) is None
    assert check(29 * DEADLOCK_FACTOR, waits=99) is None
    problem = check(DEADLOCK_FACTOR, waits=99)
    assert problem is not None
    assert "all 2 ranks have waited for each other for 120 seconds" in problem


ABSENT_AT_FIRST = """
import os, time
from tests.blank import sitecustomize
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    os.environ["GPTFORGE_SILENCE"] = "4"
    if os.environ.get("RANK") == "1":
        time.sleep(600)
"""


@needs_linux
def test_torchrun_restarts_after_a_rank_did_not_join(play, tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABSENT_AT_FIRST)
    env = {"PYTHONPATH": python_path(tmp_path), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", f"--master_port={free_port()}",
              "--nproc_per_node=2", "--max_restarts=1"]  # fmt: skip
    train = ["--preset", "debug", "--device", "cpu", "--input", str(play), "--max_steps", "5",
             "--warmup_steps", "2", "--out_dir", "run", "--sample_every", "0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, *command(*train)[1:]],
        cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "error: rank 1 of 2 did not start within 6 seconds" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-000005").is_dir()


def resume(rank: int) -> None:
    code = main(["--resume", "run", "--max_steps", "6"])
    sys.stdout.flush()
    os._exit(code)


def signal_at_the_end_of_rank1(rank: int) -> None:
    shutdown = Comm.shutdown

    def shutdown_with_signal(comm: Comm) -> None:
        signal.raise_signal(signal.SIGTERM)
        shutdown(comm)

    if rank == 1:
        Comm.shutdown = shutdown_with_signal  # type: ignore[method-assign]
    resume(rank)


@needs_linux
def test_signal_to_a_rank_that_waits_for_the_report_of_rank0(program, play) -> None:
    flags = ("--preset", "debug", "--device", "cpu", "--input", play, "--out_dir", "run")
    assert program(*flags, "--max_steps", 5, "--sample_every", 0).code == 0
    ranks = exits_of_start(2, signal_at_the_end_of_rank1, timeout=60)
    assert [rank.code for rank in ranks] == [0, 0], ranks


@needs_linux
def test_resume_flag_on_several_ranks(program, play) -> None:
    flags = ("--preset", "debug", "--device", "cpu", "--input", play, "--out_dir", "run")
    assert program(*flags, "--max_steps", 5, "--sample_every", 0).code == 0
    ranks = exits_of_start(2, resume, timeout=60)
    output = "".join(rank.output for rank in ranks)
    assert [rank.code for rank in ranks] == [0, 0], output
    assert output.count("Resuming from step-000005: step 5 of 6") == 1
    assert Path("run/checkpoints/step-000006").is_dir()


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("device", "changed", "message"),
    [
        ("cuda:1", {}, "--device cuda:1: torchrun assigns each rank a device"),
        ("mps", {}, "--device mps: torchrun assigns each rank a device"),
        ("cpu", {"MASTER_PORT": None}, "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        ("cpu", {"WORLD_SIZE": None, "RANK": "1"}, "RANK is 1 but WORLD_SIZE is not set"),
        ("cpu", {"WORLD_SIZE": "1", "RANK": "1"}, "RANK is 1 but WORLD_SIZE is 1"),
        ("cpu", {"GPTFORGE_SILENCE": "long"}, "GPTFORGE_SILENCE=long: give seconds, such as 120"),
        ("cpu", {"GPTFORGE_SILENCE": "nan"}, "GPTFORGE_SILENCE=nan: give seconds"),
        ("cpu", {"RANK": "x"}, "RANK is 'x', not a whole number"),
        ("cpu", {"RANK": "-1"}, "RANK is '-1'"),
        ("cpu", {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ("cpu", {"LOCAL_RANK": "1e3"}, "LOCAL_RANK is '1e3'"),
        ("cpu", {"LOCAL_RANK": "5"}, "LOCAL_RANK is 5 and LOCAL_WORLD_SIZE 2"),
        ("cpu", {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ("cpu", {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ("cpu", {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999: give a port"),
        ("cpu", {"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ("cpu", {"WORLD_SIZE": "9" * 400}, "WORLD_SIZE is '999"),
    ],
)
def test_contradictory_launch_is_refused(device, changed, message) -> None:
    env = {name: value for name, value in {**LAUNCHED, **changed}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        init_distributed(device, env=env)
    assert message in str(caught.value)


def test_without_a_launcher_there_is_one_process() -> None:
    assert init_distributed("cpu", env={}).world_size == 1


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _local_device("auto", 1, local_world_size=2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="4 ranks were started here and torch finds 2 CUDA GPUs"):
        _local_device("auto", 3, local_world_size=4)
