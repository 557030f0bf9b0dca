"""The scripts under examples/ start the runs that they describe."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptforge.config import Config
from tests.distributed.spawn import free_port
from tests.programs import environment
from tests.training.runs import events, last

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_no_mistake(script) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


def start(script: str, *flags: object, **env: object) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", str(EXAMPLES / script), "--preset", "debug", "--device", "cpu"]
    env = {"PATH": path, "RESTARTS": 0, **env}
    return subprocess.Popen(
        [*command, *map(str, flags)],
        env=environment() | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with socket.create_connection(("localhost", port), 1):
                return
        except OSError:
            assert time.monotonic() < deadline, "nothing listens"
            time.sleep(0.1)


def test_two_machines_train_together(play, tmp_path) -> None:
    """Two launchers on one machine stand for two machines."""
    env = {"FIRST": "localhost", "PORT": free_port(), "GPUS": 1, "RUN": tmp_path.name}
    # The second machine starts later.
    env["GPTFORGE_SILENCE"] = 120
    flags = ("--input", play, "--out_dir", tmp_path / "run", "--sample_every", 0)
    launchers = [start("two_nodes.sh", *flags, **env)]
    try:
        # Both launchers take themselves for FIRST; the later one must find the port taken.
        wait_until_open(env["PORT"])
        launchers.append(start("two_nodes.sh", *flags, **env))
        outputs = [launcher.communicate(timeout=200)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(outputs)
    config = Config(out_dir=str(tmp_path / "run"))
    assert last(config).name == "step-000020"
    assert events(config, "start")[0]["ranks"] == 2
    # Only one of the two logs.
    assert sorted("step 19 |" in text for text in outputs) == [False, True]
