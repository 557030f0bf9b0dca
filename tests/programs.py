"""Start the program in a child process, and read a run's metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.environment import ROOT as ROOT
from tests.environment import python_path

DEBUG = ("--preset", "debug", "--device", "cpu")


def command(*args: object) -> list[str]:
    """The command line of gpt.py."""
    return [sys.executable, str(ROOT / "gpt.py"), *map(str, args)]


def environment() -> dict[str, str]:
    """For child processes, which make blank pictures."""
    path = python_path(ROOT / "tests" / "blank")
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start(*args: object, cwd: Path) -> "subprocess.Popen[str]":
    flags = subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" else 0
    return subprocess.Popen(
        command(*args),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment(),
        creationflags=flags,
    )


def events(run: Path = Path("run")) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
