"""Commands that are printed to be copied: how this program was called, and paths as a shell reads
them.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path


def program() -> str:
    """How this program was called."""
    return f"python {script()}" if Path(sys.argv[0]).suffix == ".py" else "gptforge"


def script() -> str:
    """The same, as another program may start it in Python's place."""
    called = Path(sys.argv[0])
    is_script = called.suffix == ".py" and called.name != "__main__.py"
    return quote(called.as_posix()) if is_script else "-m gptforge"


def quote(path: str) -> str:
    """A path as a shell takes it for one word, which is no flag."""
    if path.startswith("-") and path != "-":
        path = f"./{path}"
    return subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)
