"""`--resume RUN`, and the command that resumes a run which was stopped."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptforge.cli.parsing import flag_values, rename_flags
from gptforge.config import Config
from gptforge.config_file import read_toml
from gptforge.errors import UserError
from gptforge.shell import env_int, program_name, torchrun_target

TAKEN_FROM_RUN = ("config", "out_dir", "preset", "restart")


def expand_resume(args: Sequence[str]) -> list[str]:
    """Add the flags that `--resume RUN` stands for: `--config` and `--out_dir` of that run.

    Raises:
        UserError: if there is no such run, or for a flag that contradicts it.
    """
    name = flag_values(args, ("resume",)).get("resume")
    if not name:
        return list(args)
    flags = flag_values(rename_flags(Config, args))
    if flag := next(filter(flags.__contains__, TAKEN_FROM_RUN), None):
        raise UserError(f"--resume {name} takes --{flag} from the run: leave --{flag} out")
    run = _find_run(Path(name))
    return [*args, f"--config={(run / 'config.toml').as_posix()}", f"--out_dir={run.as_posix()}"]


def resume_command(env: Mapping[str, str], args: str) -> str:
    """How this program was started, with torchrun's options as far as known, and new arguments."""
    nproc, world_size = env.get("LOCAL_WORLD_SIZE", "N"), env.get("WORLD_SIZE", "1")
    if env_int("WORLD_SIZE", 1, env) < 2:
        return f"{program_name()} {args}".rstrip()
    nodes = "" if nproc == world_size else "... "
    return f"torchrun {nodes}--nproc_per_node={nproc} {torchrun_target()} {args}".rstrip()


def _find_run(path: Path) -> Path:
    """The run folder at a path, or the one around a checkpoint."""
    if path.exists():
        for parents in ("", "..", "../.."):
            # Not resolved: `best` is a link, and the folder's name is shown as it was given.
            folder = Path(os.path.normpath(path / parents))
            if _is_run(folder):
                return folder
    raise UserError(
        f"--resume {path}: there is no run: give the folder of a run, or a checkpoint in one"
    )


def _is_run(folder: Path) -> bool:
    """Whether training wrote the configuration there; checkpoints and exports hold a copy of it."""
    try:
        _, is_from_run = read_toml(folder / "config.toml")
    except UserError:
        return False
    return is_from_run and not (folder / "model.safetensors").exists()
