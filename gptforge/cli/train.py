"""`gptforge [train]`: train a model, or resume a run."""

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptforge.cli.parsing import expand_bool_flags, parse_train_args, rename_flags, resolve_preset
from gptforge.config import Config
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError
from gptforge.printable import safe_print
from gptforge.report.log_handler import log_to
from gptforge.shell import env_int, program_name, torchrun_target

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gptforge.distributed import Comm
    from gptforge.train.signals import StopReason
    from gptforge.train.trainer import Trainer

START_TIME = time.monotonic()
"""`--time_limit` counts from here, so importing torch and preparing the text are included."""


@dataclass(frozen=True)
class TrainingEnd:
    """Why training ended, the run folder, and the ranks, which have left each other."""

    reason: "StopReason"
    out_dir: str
    comm: "Comm"


def main(args: list[str], *, epilog: str = "") -> int:
    """Train to the end, or until a signal or the time limit; returns the exit code."""
    config: Config
    config, explicit = parse_train_args(args, epilog=epilog)
    prewarm_cuda(config.device)
    # Read before training, so that an invalid value cannot fail a finished run.
    max_restarts = env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    end = run_training(
        config,
        explicit,
        program=program_name(),
        command=shlex.join(args),
        start_time=START_TIME,
        log=_log,
    )
    from gptforge.train.signals import EXIT_CODES

    if end.comm.is_main and end.reason not in ("finished", "early_stop"):
        safe_print(f"Resume with: {_launch_command(os.environ)} {_resume_args(args)}".rstrip())
    # With --max_restarts, torchrun would restart a rank that exits with an error.
    return end.comm.exit(0 if max_restarts > 0 else EXIT_CODES[end.reason])


def run_training(
    config: Config,
    explicit: frozenset[str],
    *,
    program: str,
    command: str,
    start_time: float,
    log: Callable[[str], None],
    on_built: "Callable[[Trainer], object]" = lambda trainer: None,
) -> TrainingEnd:
    """Train on all ranks: what `gptforge train` and `gptforge.train` have in common.

    Args:
        config: as merged from preset, file and flags; a preset is chosen if it names none.
        explicit: fields that the user set.
        program: how the program is called, for the commands that it prints.
        command: the arguments, for the log.
        start_time: `time.monotonic()` from which the time limit counts.
        log: prints a line.
        on_built: called with the trainer before it trains; not for a finished run.
    """
    with log_to(log) as handler:
        if os.environ.get("RANK", "0") != "0":
            handler.addFilter(lambda record: hasattr(record, "any_rank"))
        config = resolve_preset(config, explicit)
        import torch

        from gptforge.distributed import init_distributed

        # Before anything slow: from here on the watchdog sees that this rank is alive.
        comm = init_distributed(config.device)
        trainer: Trainer | None = None
        try:
            from gptforge.builders.build_trainer import build_trainer
            from gptforge.builders.resolve import resolve_out_dir
            from gptforge.builders.train_teachers import TeacherStopped

            reason: StopReason = "finished"
            try:
                trainer = build_trainer(
                    config,
                    explicit=explicit,
                    program=program,
                    command=command,
                    comm=comm,
                    start_time=start_time,
                )
            except TeacherStopped as stop:
                reason = stop.reason
            if trainer is not None:
                on_built(trainer)
                if comm.is_main:
                    handler.write = trainer.report.log  # above the progress bar
                reason = trainer.fit()
            if reason == "time_limit":
                logger.info(
                    f"The time limit of {config.time_limit:g} minutes is reached; all is saved."
                )
            comm.shutdown()
        except torch.OutOfMemoryError:
            error = RunError(
                f"the device ran out of memory with --batch_size {config.batch_size}: leave it "
                "out, and a micro-batch that fits is chosen, with the same results"
            )
            comm.abort(error)
            raise error from None
        except BaseException as error:
            comm.abort(error)
            raise
        finally:
            if trainer is not None:
                _close(trainer)
    return TrainingEnd(reason, trainer.config.out_dir if trainer else resolve_out_dir(config), comm)


def _close(trainer: "Trainer") -> None:
    """After an error: complete a running save and unlock the run folder."""
    with contextlib.suppress(Exception):
        trainer.saver.wait()
    if trainer.lock is not None:
        trainer.lock.release()


def _log(text: str) -> None:
    from gptforge.report.console import Console

    Console().log(text)


def _launch_command(env: Mapping[str, str]) -> str:
    """How this program was started, with torchrun's options as far as they are known."""
    nproc, world_size = env.get("LOCAL_WORLD_SIZE", "N"), env.get("WORLD_SIZE", "1")
    if env_int("WORLD_SIZE", 1, env) < 2:
        return program_name()
    nodes = "" if nproc == world_size else "... "
    return f"torchrun {nodes}--nproc_per_node={nproc} {torchrun_target()}"


def _resume_args(args: Sequence[str]) -> str:
    """The arguments without --restart, which would discard the run."""
    expanded = expand_bool_flags(Config, rename_flags(Config, args))
    kept = [arg for arg in expanded if not arg.startswith("--restart=")]
    while "--restart" in kept:
        index = kept.index("--restart")
        del kept[index : index + 2]
    return shlex.join(kept)
