"""Commands that are printed to be copied: how this program was called, and paths as a shell reads
them.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from gptforge.errors import UserError
from gptforge.printable import short_repr


def program_name() -> str:
    """How this program was called."""
    return f"python {torchrun_target()}" if Path(sys.argv[0]).suffix == ".py" else "gptforge"


def torchrun_target() -> str:
    """The same, as another program may start it in Python's place."""
    called = Path(sys.argv[0])
    is_script = called.suffix == ".py" and called.name != "__main__.py"
    return quote(called.as_posix()) if is_script else "-m gptforge"


def quote(path: str) -> str:
    """A path as a shell takes it for one word, which is no flag."""
    if path.startswith("-") and path != "-":
        path = f"./{path}"
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)


def env_int(name: str, default: int, env: Mapping[str, str] = os.environ) -> int:
    """A whole number, 0 or more, from an environment variable.

    Raises:
        UserError: if it is set to anything else.
    """
    word = env.get(name, str(default))
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise UserError(
            f"the environment variable {name} is {short_repr(word)}, not a whole number: unset it, "
            "or start several processes with torchrun"
        )
    return int(word)
