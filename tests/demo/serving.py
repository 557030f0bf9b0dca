"""The page as a subprocess, and a small run to show."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptforge.cli import main
from tests.environment import python_path

ROOT = Path(__file__).parents[2]
QUIET = {"OMP_NUM_THREADS": "1", "GPTFORGE_DEBUG": "1"}

# A text of 1,000 tokens takes minutes, and a server that waited for it would have no limit.
SLOW = """
import sys, time
import uvicorn
from gptforge.demo import api, generation_queue
from gptforge.demo.launch import launch
from gptforge.inference.language_model import LanguageModel

class PatientConfig(uvicorn.Config):
    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"timeout_graceful_shutdown": None})

stream_tokens = LanguageModel.stream_tokens

def slow_stream_tokens(model, prompt, max_new_tokens, *args, **options):
    for token in stream_tokens(model, prompt, max_new_tokens, *args, **options):
        time.sleep(0.3 if max_new_tokens == 1000 else 0.03)
        yield token

uvicorn.Config = PatientConfig
api.MAX_SECONDS = 600.0
# One visitor at a time.
generation_queue.MAX_CONCURRENT, generation_queue.MAX_QUEUED = 1, int(sys.argv[1])
LanguageModel.stream_tokens = slow_stream_tokens
launch("run", device="cpu")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a run of 20 steps."""
    folder = tmp_path_factory.mktemp("demo")
    line = "ROMEO:\nBut soft, what light through yonder window breaks?\n\n"
    (folder / "play.txt").write_text(line * 150)
    flags = ("--preset", "debug", "--device", "cpu", "--input", "play.txt", "--out_dir", "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*flags]) == 0
    return folder


def start_demo(folder: Path) -> subprocess.Popen[str]:
    """`gptforge demo` that listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptforge", "demo", "run", "--device", "cpu"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()},
    )
    assert process.stdout is not None and "http://" in process.stdout.readline()
    return process


@contextmanager
def server(folder: Path, *command: str) -> Iterator[str]:
    """The address of the page, at the first free port; one that does not end at once fails."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | QUIET | {"PYTHONPATH": python_path()},
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert address, first + process.stdout.read()
        yield address[0]
    finally:
        process.terminate()
        try:
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        assert output in ("", "terminated\n")
