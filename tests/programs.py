"""Start the program in a child process, and read a run's metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.environment import ROOT as ROOT
from tests.environment import python_path

DEBUG = ("--preset", "debug", "--device", "cpu")
PROGRAM = """
import runpy, sys
from tests.pictures import use_blank_pictures
use_blank_pictures()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*args: object) -> list[str]:
    """The command line of gpt.py, with blank pictures, for the environment `environment()`."""
    return [sys.executable, "-c", PROGRAM, str(ROOT / "gpt.py"), *map(str, args)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}


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
