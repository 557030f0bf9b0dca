"""One process a run folder: two would write over each other's logs and checkpoints."""

from pathlib import Path

from gptforge.errors import UserError
from gptforge.holding import Hold, hold


def lock_run(folder: Path) -> Hold:
    """Hold a run folder until what this returns is closed or the process ends.

    Raises:
        UserError: if another process holds it.
    """
    held = hold(folder)
    if held is None:
        raise UserError(
            f"{folder.as_posix()} is being trained by another process: wait for it, or choose "
            "another --out_dir"
        )
    return held
