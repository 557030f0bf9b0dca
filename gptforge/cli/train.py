"""`gptforge [train]`: train a model, or resume a run."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence

from gptforge.cli.parsing import expand_bool_flags, parse_train_args, rename_flags, resolve_preset
from gptforge.config import Config
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError
from gptforge.printable import safe_print
from gptforge.report.log_handler import log_to
from gptforge.shell import env_int, program_name, torchrun_target

START_TIME = time.monotonic()
"""`--time_limit` counts from here, so importing torch and preparing the text are included."""


def main(args: list[str], *, epilog: str = "") -> int:
    """Train to the end, or until a signal or the time limit; returns the exit code."""
    config: Config
    config, explicit = parse_train_args(args, epilog=epilog)
    prewarm_cuda(config.device)
    # Read before training, so that an invalid value cannot fail a finished run.
    max_restarts = env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    with log_to(_log) as handler:
        if os.environ.get("RANK", "0") != "0":
            handler.addFilter(lambda record: hasattr(record, "any_rank"))
        config = resolve_preset(config, explicit)
        import torch

        from gptforge.distributed import init_distributed

        # Before anything slow: from here on the watchdog sees that this rank is alive.
        comm = init_distributed(config.device)
        try:
            from gptforge.builders.build_trainer import build_trainer
            from gptforge.builders.train_teachers import TeacherStopped
            from gptforge.train.signals import EXIT_CODES

            try:
                trainer = build_trainer(
                    config,
                    explicit=explicit,
                    program=program_name(),
                    command=shlex.join(args),
                    comm=comm,
                    start_time=START_TIME,
                )
            except TeacherStopped as stop:
                trainer, reason = None, stop.reason
            else:
                if trainer and comm.is_main:
                    handler.write = trainer.report.log  # above the progress bar
                reason = trainer.fit() if trainer else "finished"
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
    if comm.is_main:
        if reason == "time_limit":
            print(f"The time limit of {config.time_limit:g} minutes is reached; all is saved.")
        if reason not in ("finished", "early_stop"):
            safe_print(f"Resume with: {_launch_command(os.environ)} {_resume_args(args)}".rstrip())
    # With --max_restarts, torchrun would restart a rank that exits with an error.
    return comm.exit(0 if max_restarts > 0 else EXIT_CODES[reason])


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
