"""The command that started this program, shell quoting, and integers from the environment."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptforge.errors import UserError
from gptforge.printable import short_repr


@dataclass(frozen=True)
class Start:
    """How a run was started."""

    program: str = "python gpt.py"  # for the commands that it prints
    args: str = ""  # for its log
    time: float = field(default_factory=time.monotonic)  # from which its time limit counts

    @property
    def command(self) -> str:
        """Program and arguments."""
        return f"{self.program} {self.args}".strip()


def program_name() -> str:
    """How this program was started: `python gpt.py` or `gptforge`."""
    return f"python {torchrun_target()}" if Path(sys.argv[0]).suffix == ".py" else "gptforge"


def torchrun_target() -> str:
    """What torchrun is given to start this program: `gpt.py` or `-m gptforge`."""
    path = Path(sys.argv[0])
    is_script = path.suffix == ".py" and path.name != "__main__.py"
    return quote(path.as_posix()) if is_script else "-m gptforge"


def quote(path: str) -> str:
    """A path as one shell word that is not taken for a flag."""
    if path.startswith("-") and path != "-":
        path = f"./{path}"
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)


def shown(path: Path) -> str:
    """An absolute path as messages and commands have it: relative within the working folder."""
    here = Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()


def env_int(name: str, default: int, env: Mapping[str, str] = os.environ) -> int:
    """A non-negative integer from an environment variable, as launchers set them.

    Raises:
        UserError: if the variable holds anything else.
    """
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(
            f"the environment variable {name} is {short_repr(text)}, not a whole number: unset it, "
            "or start several processes with torchrun"
        )
    return int(text)


def same_command(*, restart: bool) -> str:
    """What to call the command that resumes its work, in messages: `--restart` would not."""
    return "the same command without --restart" if restart else "the same command"
