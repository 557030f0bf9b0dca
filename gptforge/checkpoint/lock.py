"""One process a run folder: two would write over each other's logs and checkpoints."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO

from gptforge.errors import UserError


def lock_run(folder: Path) -> IO[str]:
    """Hold a run folder until the file that this returns is closed or the process ends.

    The lock lies in the temporary folder, not in the run's, which may not exist yet. The operating
    system lets go of it however the process ends.

    Raises:
        UserError: if another process on this machine holds it.
    """
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:24]
    file = (Path(tempfile.gettempdir()) / f"gptforge-{name}.lock").open("a", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{folder.as_posix()} is being trained by another process: wait for it, or choose "
            "another --out_dir"
        ) from None
    return file
