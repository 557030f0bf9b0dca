"""A lost rank is named and ends the run on all; a restart resumes from the last checkpoint."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.config import Config
from gptforge.distributed import Comm, watchdog
from gptforge.distributed.watchdog import HeartbeatMonitor, is_connection_error
from gptforge.errors import RunError, UserError
from tests.distributed.spawn import RankExit, exits_of, free_port
from tests.environment import python_path
from tests.programs import command, environment
from tests.training.runs import events, last

HOST = socket.gethostname()
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def run_with_fault(comm: Comm, config: dict, fault: str) -> None:
    """A run in which something happens to rank 1 in its fifth step."""
    trainer = build_trainer(Config(**config), explicit=(), comm=comm)
    train_step = trainer.train_step

    def train_step_with_fault():
        if comm.rank == 1 and trainer.state.step == 5:
            match fault:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hangs":
                    time.sleep(600)
                case "fails":
                    raise RunError("no disk here")
                case "user error":
                    raise UserError("--flag is wrong")
        return train_step()

    trainer.train_step = train_step_with_fault
    trainer.fit()


def exits(
    config: Config, fault: str, *, timeout: float = 30.0, world_size: int = 2
) -> list[RankExit]:
    found = exits_of(world_size, run_with_fault, vars(config), fault, timeout=timeout)
    assert (Path(config.out_dir) / "metrics.jsonl").is_file(), "it ended before the first step"
    return found


def rank1_is_interrupted(comm: Comm) -> None:
    if comm.rank == 1:
        raise KeyboardInterrupt("nothing is lost")
    time.sleep(600)


@needs_linux
def test_an_interrupted_rank_says_what_is_lost() -> None:
    first, second = exits_of(2, rank1_is_interrupted, timeout=30)
    assert first.code == second.code == 130
    assert f"error: rank 1 on {HOST}: interrupted: nothing is lost\n" in second.output


@needs_linux
def test_killed_rank_is_named_at_once(config) -> None:
    first, second, *others = exits(config, "killed", world_size=4)
    assert second.code == -signal.SIGKILL
    assert {first.code, *(other.code for other in others)} == {1}
    assert f"error: rank 1 on {HOST} has died (process " in first.output


@needs_linux
def test_stopped_rank_is_named(config) -> None:
    first, _ = exits(config, "stopped", timeout=6)
    assert first.code == 1
    assert f"error: rank 1 on {HOST} has sent no heartbeat for " in first.output


def test_hanging_rank_is_named(config) -> None:
    first, second = exits(config, "hangs", timeout=6)
    assert first.code == second.code == 1
    assert f"error: rank 1 on {HOST} stalled for " in first.output + second.output
    assert "while the others waited" in first.output + second.output


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [("fails", 1, "no disk here"), ("user error", 2, "--flag is wrong")],
)
def test_failing_rank_ends_all_with_one_message_and_code(config, fault, code, message) -> None:
    first, second = exits(config, fault)
    assert first.code == second.code == code
    assert f"error: rank 1 on {HOST}: {message}" in second.output
    # Once per machine.
    assert "error: rank" not in first.output


def heartbeat(*, beat: float = 0, progress: int = 1, busy: int = 0) -> dict:
    return {"pid": 1, "host": "far", "beat": beat, "progress": progress, "busy": busy,
            "waiting": 0, "wait_count": 0}  # fmt: skip


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_unchanged_heartbeats_count_as_none(clock) -> None:
    monitor = HeartbeatMonitor(30)
    assert monitor.find_lost({1: heartbeat(beat=1)}, "here") is None
    clock(20)
    assert monitor.find_lost({1: heartbeat(beat=2)}, "here") is None
    clock(29)
    assert monitor.find_lost({1: heartbeat(beat=2)}, "here") is None
    clock(2)
    problem = monitor.find_lost({1: heartbeat(beat=2)}, "here")
    assert problem == "rank 1 on far has sent no heartbeat for 31 seconds"


def test_stall_is_allowed_before_the_first_step_and_while_a_rank_is_busy(clock) -> None:
    monitor = HeartbeatMonitor(30)
    for _ in range(100):
        clock(10)
        beats = {0: heartbeat(progress=0), 1: heartbeat(progress=0)}
        assert monitor.find_stall(beats) is None
    for _ in range(100):
        clock(10)
        beats = {0: heartbeat(progress=9, busy=1), 1: heartbeat(progress=7)}
        assert monitor.find_stall(beats) is None
    for _ in range(3):
        clock(10)
        problem = monitor.find_stall({0: heartbeat(progress=9), 1: heartbeat(progress=7)})
    assert problem == "rank 1 on far stalled for 30 seconds while the others waited"


def test_slow_machine_does_not_count_as_stalled(clock) -> None:
    monitor = HeartbeatMonitor(30)
    for beat in range(90):
        clock(10)
        # A step every 20 seconds; then one that takes 80.
        progress = 1 + min(beat // 2, 10) + (beat > 28)
        problem = monitor.find_stall(dict.fromkeys((0, 1), heartbeat(progress=progress)))
        if beat < 40:
            assert problem is None
    assert problem is not None and problem.startswith("all ranks have stalled for")


def test_only_a_connection_error_is_blamed_on_other_ranks() -> None:
    assert is_connection_error(torch.distributed.DistBackendError("NCCL"))
    assert is_connection_error(RuntimeError("[gloo/pair.cc:1] Connection closed by peer [::1]:4"))
    assert not is_connection_error(RuntimeError("shapes do not match"))
    assert not is_connection_error(RunError("Connection closed by peer"))


def start(folder: Path, *flags: str, env: dict[str, str], before: tuple[str, ...] = ()):
    """Start gpt.py on a tiny model, with its output in `folder`/out.txt."""
    with (folder / "out.txt").open("w") as out:
        return subprocess.Popen(
            [*before, *command(*FLAGS, *flags)],
            env=environment() | env, stdout=out, stderr=out, cwd=folder,
        )  # fmt: skip


FLAGS = (
    *("--preset", "debug", "--device", "cpu", "--warmup_steps", "5", "--eval_every", "9999"),
    *("--sample_every", "0", "--save_every", "20", "--log_every", "10"),
)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process.poll() is None, "the process ended"
        time.sleep(0.05)


def process_of_rank(rank: int, out_dir: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                env = (entry / "environ").read_bytes().split(b"\0")
                args = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in env and out_dir.encode() in args:
                return int(entry.name)
    raise AssertionError(f"there is no rank {rank}")


@needs_linux
def test_torchrun_restarts_a_run_that_lost_a_rank_and_it_resumes(program, play, tmp_path) -> None:
    flags = ("--input", str(play), "--max_steps", "60")
    assert program(*FLAGS, *flags, "--out_dir", "uninterrupted").code == 0
    out = str(tmp_path / "run")
    # --restart only applies to the first start: after that there are checkpoints to resume from.
    args = (*flags, "--out_dir", out, "--restart")
    batch = ("--batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "60")
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(RANK_1_HANGS)
    env = {"PYTHONPATH": python_path(folder), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", f"--master_port={free_port()}",
              "--nproc_per_node=2", "--max_restarts=1"]  # fmt: skip
    with (folder / "out.txt").open("w") as out_file:
        run = subprocess.Popen(
            [sys.executable, *launch, *command(*FLAGS, *args, *batch)[1:]],
            env={**os.environ, **env}, stdout=out_file, stderr=out_file,
        )  # fmt: skip
    wait_for(lambda: (Path(out) / "checkpoints" / "step-000020").is_dir(), run)
    os.kill(process_of_rank(1, out), signal.SIGKILL)
    code = run.wait(200)
    output = (folder / "out.txt").read_text()
    assert code == 0, output
    assert f"error: rank 1 on {HOST} has died" in output
    assert "from step-0000" in output
    configs = Config(out_dir=str(tmp_path / "uninterrupted")), Config(out_dir=out)
    assert last(configs[1]).name == "step-000060"
    losses = [{e["step"]: e["loss"] for e in events(c, "train")} for c in configs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(events(configs[1], "resume")) == 1


# Until it is killed, with steps left to resume.
RANK_1_HANGS = """
import os
from tests.blank import sitecustomize
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and os.environ.get("RANK") == "1":
    from gptforge.training import trainer
    import time
    train_step = trainer.Trainer.train_step
    def train_step_or_hang(self):
        time.sleep(600 if self.state.step > 20 else 0)
        return train_step(self)
    trainer.Trainer.train_step = train_step_or_hang
"""


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, ...]]]:
    """Command prefixes for two hosts (network namespaces) with a wire between them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces need iproute2 and unshare")
    names = [f"gf{os.getpid()}{side}" for side in "ab"]

    def ip(*args: str) -> None:
        done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire0",
           "netns", names[1])  # fmt: skip
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "wire0")
            ip("-n", name, "link", "set", "wire0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [
            ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c",
             'hostname "$0"; exec "$@"', name)
            for name in names
        ]  # fmt: skip
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


# A rank waits for the other for seconds, and a busy machine may start it later than that.
STARTS_TOGETHER = """
import os, time
from pathlib import Path
from tests.blank import sitecustomize
import gptforge.builders.build_trainer  # takes most of the time of a start
folder = Path(__file__).parent
(folder / os.environ["RANK"]).touch()
while not all((folder / rank).exists() for rank in "01"):
    time.sleep(0.01)
"""


def test_host_that_is_cut_off_is_named_on_both_hosts(play, tmp_path, two_hosts):
    (tmp_path / "sitecustomize.py").write_text(STARTS_TOGETHER)
    address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(free_port())}
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    more = {"GLOO_SOCKET_IFNAME": "wire0", "GPTFORGE_SILENCE": "8"}
    more["PYTHONPATH"] = python_path(tmp_path)
    processes = []
    for rank, before in enumerate(two_hosts):
        folder = tmp_path / f"host-{rank}"
        folder.mkdir()
        env = {**address, **world, **more, "RANK": str(rank)}
        flags = ("--input", str(play), "--out_dir", "run", "--max_steps", "1000000")
        processes.append(start(folder, *flags, env=env, before=before))
    outputs = [tmp_path / f"host-{rank}" / "out.txt" for rank in range(2)]
    wait_for(lambda: "step 20 |" in outputs[0].read_text(), processes[0])
    assert not (tmp_path / "host-1" / "run").exists()
    names = [before[-1] for before in two_hosts]
    cut = ["ip", "-n", names[1], "link", "set", "wire0", "down"]
    subprocess.run(cut, check=True)
    assert [process.wait(120) for process in processes] == [1, 1]
    first, second = (path.read_text() for path in outputs)
    assert f"error: rank 1 on {names[1]} has sent no heartbeat for " in first
    assert f"error: rank 1 on {names[1]} can no longer reach the other ranks at 10.77" in second
