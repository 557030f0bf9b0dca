"""One process a run folder: two would write over each other's logs and checkpoints."""

from pathlib import Path
from typing import IO

from gptforge import files
from gptforge.errors import UserError


def lock_run(folder: Path) -> IO[str]:
    """Hold a run folder until the file that this returns is closed or the process ends.

    Raises:
        UserError: if another process on this machine holds it.
    """
    held = files.hold(folder)
    if held is None:
        raise UserError(
            f"{folder.as_posix()} is being trained by another process: wait for it, or choose "
            "another --out_dir"
        )
    return held
