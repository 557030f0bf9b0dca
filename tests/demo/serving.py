"""The page as a subprocess, and a small run to show."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.environment import python_path

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "GPTFORGE_DEBUG": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run of 20 steps."""
    folder = tmp_path_factory.mktemp("demo")
    line = "ROMEO:\nBut soft, what light through yonder window breaks?\n\n"
    (folder / "play.txt").write_text(line * 150)
    train = ["--preset", "debug", "--device", "cpu", "--input", "play.txt", "--out_dir", "run"]
    command = [sys.executable, str(ROOT / "gpt.py"), *train]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=os.environ | QUIET)
    return folder


@contextmanager
def server(folder: Path, *command: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *(word.replace("PORT", str(port)) for word in command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | QUIET | {"PYTHONPATH": python_path()},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    try:
        assert f"http://127.0.0.1:{port}" in first, first + process.stdout.read()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=30)
        assert output in ("", "terminated\n")
