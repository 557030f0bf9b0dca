"""A rank that is lost ends the run on all, by name, and a restart goes on from what was saved."""

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

from gptforge.builders import build_trainer
from gptforge.config import Config
from gptforge.distributed import Comm, watchdog
from gptforge.distributed.watchdog import _RankMonitor, is_connection_error
from gptforge.errors import RunError, UserError
from tests.distributed.spawn import End, ends_of, free_port
from tests.environment import python_path
from tests.train.runs import events, last

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def trouble(ranks: Comm, values: dict, what: str) -> None:
    """A run in which something happens to rank 1 in its fifth step."""
    trainer = build_trainer(Config(**values), explicit=(), log=lambda _: None, comm=ranks)
    learn = trainer.train_step

    def with_trouble():
        if ranks.rank == 1 and trainer.state.step == 5:
            match what:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "hangs":
                    time.sleep(600)
                case "fails":
                    raise RunError("no disk here")
                case "a mistake":
                    raise UserError("--flag is wrong")
        return learn()

    trainer.train_step = with_trouble
    trainer.fit()


def ends(config: Config, what: str, *, silence: float = 30.0, count: int = 2) -> list[End]:
    found = ends_of(count, trouble, vars(config), what, silence=silence)
    assert (Path(config.out_dir) / "metrics.jsonl").is_file(), "it had not even begun"
    return found


@LINUX
def test_a_rank_that_is_killed_is_named_at_once(config) -> None:
    one, two, *others = ends(config, "killed", count=4)
    assert two.code == -signal.SIGKILL
    assert {one.code, *(other.code for other in others)} == {1}
    assert f"error: rank 1 on {HOST} has died (process " in one.said


@LINUX
def test_a_rank_that_stands_still_as_a_whole_is_named(config) -> None:
    one, _ = ends(config, "stopped", silence=3)
    assert one.code == 1
    assert f"error: rank 1 on {HOST} has given no sign of life for " in one.said


def test_a_rank_that_lives_but_hangs_is_named(config) -> None:
    one, two = ends(config, "hangs", silence=3)
    assert one.code == two.code == 1
    assert f"error: rank 1 on {HOST} stood still for " in one.said + two.said
    assert "while the others waited" in one.said + two.said


@pytest.mark.parametrize(
    ("what", "code", "text"), [("fails", 1, "no disk here"), ("a mistake", 2, "--flag is wrong")]
)
def test_a_rank_that_fails_ends_all_with_its_words_and_exit_code(config, what, code, text) -> None:
    one, two = ends(config, what)
    assert one.code == two.code == code
    assert f"error: rank 1 on {HOST}: {text}" in two.said
    # One machine says it once.
    assert "error: rank" not in one.said


def life(host: str = "far", *, beat: float = 0, progress: int = 1, busy: int = 0) -> dict:
    return {"pid": 1, "host": host, "beat": beat, "progress": progress, "busy": busy}


@pytest.fixture
def clock(monkeypatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_signs_of_life_that_stay_the_same_count_as_none(clock) -> None:
    others = _RankMonitor(30)
    assert others.find_failure({1: life(beat=1)}, None, "here") is None
    clock(20)
    assert others.find_failure({1: life(beat=2)}, None, "here") is None
    clock(29)
    assert others.find_failure({1: life(beat=2)}, None, "here") is None
    clock(2)
    said = others.find_failure({1: life(beat=2)}, None, "here")
    assert said == "rank 1 on far has given no sign of life for 31 seconds"


def test_standing_still_is_no_fault_before_the_first_step_or_while_one_is_busy(clock) -> None:
    others = _RankMonitor(30)
    for beat in range(100):
        clock(10)
        lives = {1: life(beat=beat, progress=0)}
        assert others.find_failure(lives, life(progress=0), "here") is None
    for beat in range(100, 200):
        clock(10)
        lives = {1: life(beat=beat, progress=7)}
        assert others.find_failure(lives, life(progress=9, busy=1), "here") is None
    for beat in range(200, 203):
        clock(10)
        said = others.find_failure({1: life(beat=beat, progress=7)}, life(progress=9), "here")
    assert said == "rank 1 on far stood still for 30 seconds while the others waited"


def test_a_machine_whose_steps_take_minutes_does_not_hang(clock) -> None:
    others = _RankMonitor(30)
    for beat in range(90):
        clock(10)
        # A step every 20 seconds; then one that takes 80.
        progress = 1 + min(beat // 2, 10) + (beat > 28)
        said = others.find_failure(
            {1: life(beat=beat, progress=progress)}, life(progress=progress), "x"
        )
        if beat < 40:
            assert said is None
    assert said is not None and said.startswith("all ranks have stood still for")


def test_only_a_lost_connection_is_blamed_on_others() -> None:
    assert is_connection_error(torch.distributed.DistBackendError("NCCL"))
    assert is_connection_error(RuntimeError("[gloo/pair.cc:1] Connection closed by peer [::1]:4"))
    assert not is_connection_error(RuntimeError("shapes do not match"))
    assert not is_connection_error(RunError("Connection closed by peer"))


def start(folder: Path, *flags: str, env: dict[str, str], before: tuple[str, ...] = ()):
    """gpt.py on a tiny model, with its words in `folder`/said."""
    words = [sys.executable, str(ROOT / "gpt.py"), *FLAGS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **env}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(
            [*before, *words], env=environment, stdout=said, stderr=said, cwd=folder
        )


FLAGS = (
    *("--preset", "debug", "--device", "cpu", "--warmup_steps", "5", "--eval_every", "9999"),
    *("--sample_every", "0", "--save_every", "20", "--log_every", "10"),
)


def wait_for(what: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it took too long"
        assert process.poll() is None, "it ended before"
        time.sleep(0.05)


def process_of_rank(rank: int, out_dir: str) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                env = (entry / "environ").read_bytes().split(b"\0")
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={rank}".encode() in env and out_dir.encode() in words:
                return int(entry.name)
    raise AssertionError(f"there is no rank {rank}")


@LINUX
def test_torchrun_restarts_a_run_that_lost_a_rank_and_it_goes_on(play, tmp_path) -> None:
    flags = ("--input", str(play), "--max_steps", "60")
    straight = start(tmp_path, *flags, "--out_dir", "straight", env={})
    out = str(tmp_path / "run")
    # Thrown away once, at the first start: a restart must not throw away what that one saved.
    own = (*flags, "--out_dir", out, "--overwrite")
    # Slow enough that there is something left to go on with.
    slow = ("--batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "60")
    folder = tmp_path / "launch"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOWLY)
    env = {"PYTHONPATH": python_path(folder), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", f"--master_port={free_port()}",
              "--nproc_per_node=2", "--max_restarts=1"]  # fmt: skip
    with (folder / "said").open("w") as said:
        run = subprocess.Popen(
            [sys.executable, *launch, str(ROOT / "gpt.py"), *FLAGS, *own, *slow],
            env={**os.environ, **env}, stdout=said, stderr=said,
        )  # fmt: skip
    wait_for(lambda: (Path(out) / "checkpoints" / "step-000020").is_dir(), run)
    os.kill(process_of_rank(1, out), signal.SIGKILL)
    code = run.wait(120)
    said = (folder / "said").read_text()
    assert code == 0, said
    assert straight.wait(120) == 0
    assert f"error: rank 1 on {HOST} has died" in said
    assert "going on from step-0000" in said
    one = Config(out_dir=str(tmp_path / "straight"))
    two = Config(out_dir=out)
    assert last(two).name == "step-000060"
    losses = [{e["step"]: e["loss"] for e in events(c, "train")} for c in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(events(two, "resume")) == 1


SLOWLY = """
import os
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    import gptforge.train.trainer as trainer
    import time
    learn = trainer.Trainer.learn
    def slowly(self):
        time.sleep(0.1 if self.progress.step > 20 else 0)
        return learn(self)
    trainer.Trainer.learn = slowly
"""


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, ...]]]:
    """Commands that run what follows them on one of two hosts with a wire between them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces need iproute2 and unshare")
    names = [f"gf{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
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


def test_two_hosts_train_together_and_one_cut_off_is_named_on_both(play, tmp_path, two_hosts):
    address = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": str(free_port())}
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    more = {"GLOO_SOCKET_IFNAME": "wire0", "GPTFORGE_SILENCE": "4"}
    processes = []
    for rank, before in enumerate(two_hosts):
        folder = tmp_path / f"host-{rank}"
        folder.mkdir()
        env = {**address, **world, **more, "RANK": str(rank)}
        flags = ("--input", str(play), "--out_dir", "run", "--max_steps", "1000000")
        processes.append(start(folder, *flags, env=env, before=before))
    said = [tmp_path / f"host-{rank}" / "said" for rank in range(2)]
    wait_for(lambda: "step 20 |" in said[0].read_text(), processes[0])
    assert not (tmp_path / "host-1" / "run").exists()
    names = [before[-1] for before in two_hosts]
    cut = ["ip", "-n", names[1], "link", "set", "wire0", "down"]
    subprocess.run(cut, check=True)
    assert [process.wait(60) for process in processes] == [1, 1]
    one, two = (path.read_text() for path in said)
    assert f"error: rank 1 on {names[1]} has given no sign of life for " in one
    assert f"error: rank 1 on {names[1]} cannot reach the other ranks, at 10.77.0.1" in two
