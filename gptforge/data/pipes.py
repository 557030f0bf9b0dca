"""Standard input and pipes as files: they can be read only once, and preparing reads twice."""

import os
import select
import shutil
import stat
import sys
from pathlib import Path
from typing import IO

from gptforge import files
from gptforge.errors import UserError

WAIT = 10.0
"""Seconds after which a pipe that no program has opened for writing is given up."""


def is_pipe(path: Path) -> bool:
    """Whether a path is a named pipe, or what a shell makes of `<(command)`."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def spool(source: Path | None, path: Path) -> None:
    """Write all that comes out of a pipe, or of standard input if it is None, to a file.

    Raises:
        UserError: if nobody writes to the pipe.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, partial.open("wb") as file:
        if source is None:
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        else:
            _copy(source, file)


def _copy(source: Path, file: IO[bytes]) -> None:
    # Opened in the usual way, it would block until somebody opens the other end.
    descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    had_writer = False
    with open(descriptor, "rb", buffering=0) as pipe:  # noqa: PTH123 (it is a descriptor)
        while True:
            block = pipe.read(2**20)
            if block:
                file.write(block)
                had_writer = True
            elif block is None:
                had_writer = True
                select.select([pipe], [], [])
            elif had_writer:
                return
            elif select.select([pipe], [], [], WAIT)[0]:
                had_writer = True
            else:
                raise UserError(
                    f"{source.as_posix()}: no program has written to this pipe in {WAIT:g} s: "
                    "start the one that should, or give a file"
                )
