"""The teachers of `--teachers`: their configurations, and their weights once they are trained.

Each is an ordinary run with another seed, in the folder `teachers/` of the student's run, so it is
saved, resumed and used like any other. They are independent: an ensemble gains from different
errors, which a chain, where each learns from the one before, would pass on.
"""

import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path

import torch

from gptforge.builders.resolve import config_of_run
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.out_dir import TEACHERS
from gptforge.checkpoint.state_dict import load_model_state_dict
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import SEED_LIMIT, Config
from gptforge.data.prepare.sources import is_pipe
from gptforge.distributed import Comm
from gptforge.errors import UserError
from gptforge.kernels.distillation import MAX_VOCAB
from gptforge.model import GPT
from gptforge.training.distillation import Distillation


def check_teachers(config: Config) -> None:
    """Raise a UserError if `--teachers` does not work with the rest of a resolved configuration."""
    if not config.teachers:
        return
    if config.vocab_size > MAX_VOCAB:
        raise UserError(
            f"--teachers is for vocabularies of at most {MAX_VOCAB:,} rows, and this one has "
            f"{config.vocab_size:,}: use --tokenizer char or a smaller one, or leave it out"
        )
    if is_pipe(Path(config.input)):
        raise UserError(f"--input {config.input} is a pipe, and --teachers need a file: save it")
    if config.parallel == "fsdp":
        raise UserError("--teachers needs --parallel ddp: each rank has a full copy of them")


def cost_with_teachers(config: Config) -> float:
    """Time of the steps of a run and its teachers, as a multiple of the run's without teachers.

    A teacher's step takes as long as one without teachers, and its forward a third of that.
    """
    steps = config.teacher_steps or config.max_steps
    return 1 + config.teachers * (1 / 3 + steps / config.max_steps)


def teacher_configs(config: Config, explicit: Collection[str], comm: Comm) -> list[Config]:
    """The configurations of all teachers of a student, new or resumed.

    Raises:
        UserError: for other `--teacher_steps` than those that the first one began with.
    """
    # The student's --max_steps may have been raised since the first one began.
    first = teacher_config(config, 1)
    steps = comm.broadcast_from_rank0(lambda: (config_of_run(first) or first).max_steps)
    if "teacher_steps" in explicit and config.teacher_steps not in (0, steps):
        raise UserError(
            f"--teacher_steps {config.teacher_steps}, but the teachers in {config.out_dir} began "
            f"with {steps}: leave it out, or start over with --restart"
        )
    config = dataclasses.replace(config, teacher_steps=steps)
    return [teacher_config(config, number) for number in range(1, config.teachers + 1)]


def teacher_config(config: Config, number: int) -> Config:
    """The configuration of teacher `number`, from 1: that of the student, with another seed."""
    steps = config.teacher_steps or config.max_steps
    return dataclasses.replace(
        config,
        # All fields are resolved: no preset is to fit them to the text or the time again.
        preset="",
        out_dir=_teacher_dir(config, number).as_posix(),
        seed=(config.seed + number) % SEED_LIMIT,
        max_steps=steps,
        warmup_steps=min(config.warmup_steps, steps),
        teachers=0,
        teacher_steps=0,
        distill_weight=Config.distill_weight,
        # Only the final weights are used: evaluate them once, and keep no others.
        patience=0,
        eval_every=steps,
        sample_every=0,
        keep_checkpoints=0,
        restart=False,
        tracker="",
    )


def load_teachers(config: Config, device: torch.device, comm: Comm) -> Distillation:
    """Load the final weights of all teachers.

    Raises:
        UserError: if one is missing, damaged or not finished.
    """
    shape = dataclasses.replace(config.model, dropout=0.0)
    teachers = []
    for number in range(1, config.teachers + 1):
        find = functools.partial(_final_checkpoint, _teacher_dir(config, number))
        path = Path(comm.broadcast_from_rank0(find))
        tensors = checkpoints.read_tensors(path, checkpoints.MODEL) if comm.is_main else {}
        teacher = GPT(shape).to(device)
        load_model_state_dict(teacher, tensors, source=path.as_posix(), comm=comm)
        teachers.append(teacher.eval().requires_grad_(False))
    return Distillation(teachers, config.distill_weight)


def _teacher_dir(config: Config, number: int) -> Path:
    return Path(config.out_dir) / TEACHERS / f"teacher-{number}"


def _final_checkpoint(folder: Path) -> str:
    """The last checkpoint of a finished teacher; its files match their hashes."""
    path, warnings = CheckpointStore(folder / "checkpoints").latest()
    # As many steps as its own run has: the student's --max_steps may be raised later.
    if path and checkpoints.step_from_path(path) >= checkpoints.read_config(path).max_steps:
        return path.as_posix()
    problem = f" ({'; '.join(warnings)})" if warnings else ""
    raise UserError(
        f"{folder.as_posix()} holds no finished teacher{problem}: put it back, or start over with "
        "--restart"
    )
