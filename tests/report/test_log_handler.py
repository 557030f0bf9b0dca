"""Messages are logged; a command prints each once, and a library only warnings."""

import logging
import subprocess
import sys

import pytest

from gptforge import distributed
from gptforge.builders import build_trainer
from gptforge.cli import train
from gptforge.distributed import SINGLE_PROCESS
from gptforge.printable import print_stderr
from gptforge.report.log_handler import log_to

LIBRARY = """
from pathlib import Path
import sys
from gptforge.data.prepare.pipeline import logger, prepare
from gptforge.data.prepare.request import PrepareRequest
for _ in range(2):
    prepare(Path("out"), PrepareRequest((sys.argv[1],), tokenizer="byte"))
logger.warning("only this")
"""


def test_messages_are_printed_once_and_escaped(capsys) -> None:
    logger, root = logging.getLogger("gptforge.data"), logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        with log_to(print_stderr):
            logger.info("100% of \x1b[31mred\nlines")
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr() == ("", "100% of \\x1b[31mred\nlines\n")
    assert not logging.getLogger("gptforge").handlers
    assert logging.getLogger("gptforge").propagate


def test_inner_block_replaces_the_outer_one(messages) -> None:
    inner: list[str] = []
    logger = logging.getLogger("gptforge.data")
    with log_to(inner.append):
        logger.info("inner")
    logger.info("outer")
    assert (inner, messages) == (["inner"], ["outer"])


def test_library_prints_warnings_only(play, tmp_path) -> None:
    command = [sys.executable, "-c", LIBRARY, str(play)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "only this\n")


@pytest.mark.parametrize(("rank", "expected"), [("0", "one\ntwo\n"), ("1", "two\n")])
def test_other_ranks_print_only_what_concerns_them(monkeypatch, capsys, rank, expected) -> None:
    def build_fake(*_: object, **__: object) -> str:
        logger = logging.getLogger("gptforge.builders")
        logger.warning("one")
        logger.warning("two", extra={"any_rank": True})
        return "finished"

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(distributed, "init_distributed", lambda device: SINGLE_PROCESS)
    monkeypatch.setattr(build_trainer, "build_trainer", build_fake)
    assert train.main(["--device", "cpu", "--preset", "debug"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("preset: debug") is (rank == "0")
    assert "".join(line for line in printed.splitlines(True) if "preset" not in line) == expected
