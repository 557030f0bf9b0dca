"""`gptforge [train]`: train a model, or resume a run."""

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gptforge.cli.parsing import flag_values, normalize_flags, parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.config_file import read_toml
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import (
    NOTHING_LOST,
    DeviceError,
    RunError,
    Terminated,
    UserError,
    device_failure,
    explain_interruption,
    explain_os_errors,
    runs_hint,
)
from gptforge.printable import print_stderr, safe_print
from gptforge.report.log_handler import EVENT, PACKAGE, RESULT, WriteHandler, log_to
from gptforge.shell import Start, env_int, program_name, quote, same_command, torchrun_target

if TYPE_CHECKING:
    from gptforge.distributed import Comm
    from gptforge.training.signals import StopReason
    from gptforge.training.trainer import Trainer

START_TIME = time.monotonic()
"""`--time_limit` counts from here, so importing torch and preparing the text are included."""
RESUME_WITHOUT_CONFIG = "the command that started the run resumes it without that file"
TAKEN_FROM_RUN = ("config", "out_dir", "preset")


@dataclass(frozen=True)
class TrainArgs(Config):
    """Train a GPT-2."""

    resume: str = ""
    """Run to resume, or a checkpoint in it, with its configuration; other flags may be added."""
    quiet: bool = False
    """Print only warnings, errors and the result."""
    verbose: bool = False
    """Print each checkpoint and sample, too."""
    log_format: Literal["text", "json"] = "text"
    """json: print the events of metrics.jsonl on stdout, one a line, and only warnings, errors and
    the result as text, on stderr."""


def main(args: list[str], *, epilog: str = "") -> int:
    """Train to the end, or until a signal or the time limit; returns the exit code."""
    parsed, explicit = parse_train_args(expand_resume(args), cls=TrainArgs, epilog=epilog)
    if parsed.quiet and parsed.verbose:
        raise UserError("--quiet and --verbose contradict each other: leave one out")
    prewarm_cuda(parsed.device)
    # Read before training, so that an invalid value cannot fail a finished run.
    max_restarts = env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    reason, out_dir, comm = run_training(
        parsed,
        explicit,
        start=Start(program_name(), shlex.join(args), START_TIME),
        logging_as=_log_as(parsed),
    )
    from gptforge.training.signals import EXIT_CODES

    if comm.is_main and reason not in ("finished", "early_stop"):
        command = resume_command(os.environ, f"--resume {quote(out_dir)}")
        (print_stderr if parsed.log_format == "json" else safe_print)(f"Resume with: {command}")
    # With --max_restarts, torchrun would restart a rank that exits with an error.
    return comm.exit(0 if max_restarts > 0 else EXIT_CODES[reason])


@explain_os_errors()
def run_training(
    config: Config,
    explicit: frozenset[str],
    *,
    start: Start,
    logging_as: AbstractContextManager[WriteHandler],
    on_built: "Callable[[Trainer], object]" = lambda trainer: None,
) -> "tuple[StopReason, str, Comm]":
    """Train on all ranks: what `gptforge train` and `gptforge.train` have in common.

    A preset is chosen if none was named. `logging_as` prints what is logged meanwhile; `on_built`
    is called with the trainer, and those of teachers, before it trains, but not for a finished run.

    Returns:
        Why training ended, the run folder, and the ranks, which have left each other.
    """
    has_started = False
    signals = contextlib.ExitStack()

    def train(trainer: "Trainer") -> "StopReason":
        nonlocal has_started
        has_started = True
        on_built(trainer)
        if trainer.comm.is_main and not trainer.report.is_teacher:
            handler.write = trainer.report.console.log  # above the progress bar
        if trainer.comm.world_size > 1:
            # To the end: between two runs, a signal would end a rank, and so fail the others. One
            # process is interrupted there at once.
            signals.enter_context(trainer.stop_signal)
        return trainer.fit()

    def hint() -> str:
        if has_started:  # a teacher, or the run itself
            return f"{same_command(restart=config.restart)} resumes what was saved"
        return NOTHING_LOST

    with logging_as as handler, explain_interruption(hint):
        if os.environ.get("RANK", "0") != "0":
            for each in PACKAGE.handlers:
                each.addFilter(lambda record: hasattr(record, "any_rank"))
        config = resolve_preset(config, explicit)
        import torch

        from gptforge.distributed import init_distributed

        # Before anything slow: from here on the watchdog sees that this rank is alive.
        comm = init_distributed(config.device)
        trainer: Trainer | None = None
        try:
            from gptforge.builders.build_trainer import build_trainer
            from gptforge.builders.resolve import resolve_out_dir

            with signals:
                built = build_trainer(
                    config, explicit=explicit, start=start, comm=comm, train_teacher=train
                )
                if isinstance(built, str):
                    reason = built
                else:
                    trainer = built
                    reason = train(trainer)
                # Until all have finished: a rank with nothing to write is done before rank 0, and
                # a signal that ended it then would end the run as a failure.
                comm.shutdown()
        except torch.OutOfMemoryError:
            error = RunError(
                f"the device ran out of memory with --batch_size {config.batch_size}: leave it "
                "out, and a micro-batch that fits is chosen, with the same results"
            )
            comm.abort(error)
            raise error from None
        except torch.AcceleratorError as error:
            comm.abort(error)
            raise DeviceError(f"{device_failure(error)}; {hint()}") from error
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, Terminated)):
                error.args = (hint(),)  # with several ranks, `abort` prints it
            comm.abort(error)
            raise
        finally:
            if trainer is not None:
                trainer.close()
    return reason, trainer.config.out_dir if trainer else resolve_out_dir(config), comm


@contextlib.contextmanager
def _log_as(args: TrainArgs) -> Iterator[WriteHandler]:
    """Log as the flags say; yields the handler that prints on stdout."""
    from gptforge.report.console import Console

    is_json = args.log_format == "json"
    level = RESULT if args.quiet or is_json else logging.INFO
    level = logging.DEBUG if args.verbose else level
    with log_to(Console().log, EVENT if is_json else level) as handler:
        if is_json:
            handler.addFilter(lambda record: record.levelno == EVENT)
            text = WriteHandler(print_stderr)
            text.setLevel(level)
            PACKAGE.addHandler(text)
        yield handler


def expand_resume(args: Sequence[str]) -> list[str]:
    """Add the flags that `--resume RUN` stands for: `--config` and `--out_dir` of that run.

    Raises:
        UserError: if there is no such run, or for a flag that contradicts it.
    """
    name = flag_values(args, ("resume",)).get("resume")
    if name is None or name.startswith("--"):  # without a value: an error below
        return list(args)
    if not name:  # as of a shell's variable that is not set
        raise UserError(f"--resume needs a run; {runs_hint()}")
    flags = flag_values(normalize_flags(Config, args))
    if flags.get("restart", "false") != "false":
        raise UserError(
            f"--resume {name} and --restart contradict each other: leave one out; --restart goes "
            "with the command that started the run"
        )
    if flag := next(filter(flags.__contains__, TAKEN_FROM_RUN), None):
        copy = "; a copy of the run's folder resumes, too" if flag == "out_dir" else ""
        raise UserError(f"--resume {name} takes --{flag} from the run: leave --{flag} out{copy}")
    run = _find_run(Path(name))
    return [*args, f"--config={(run / 'config.toml').as_posix()}", f"--out_dir={run.as_posix()}"]


def resume_command(env: Mapping[str, str], args: str) -> str:
    """How this program was started, with torchrun's options as far as known, and new arguments."""
    nproc, world_size = env.get("LOCAL_WORLD_SIZE", "N"), env.get("WORLD_SIZE", "1")
    if env_int("WORLD_SIZE", 1, env) < 2:
        return f"{program_name()} {args}"
    nodes = "" if nproc == world_size else "... "
    return f"torchrun {nodes}--nproc_per_node={nproc} {torchrun_target()} {args}"


def _find_run(path: Path) -> Path:
    unreadable: UserError | None = None
    if path.exists():
        for parents in ("", "..", "../.."):
            # Not resolved: `best` is a link, and the folder's name is shown as it was given.
            folder = Path(os.path.normpath(path / parents))
            try:
                if _is_run(folder):
                    return folder
            except UserError as error:
                unreadable = unreadable or error
    if not unreadable and (path / "checkpoints").is_dir():
        unreadable = UserError("config.toml is missing")
    if unreadable:
        raise UserError(f"--resume {path}: {unreadable}: {RESUME_WITHOUT_CONFIG}")
    raise UserError(
        f"--resume {path}: there is no run: give the folder of a run, or a checkpoint in one"
    )


def _is_run(folder: Path) -> bool:
    """Whether training wrote the configuration there; checkpoints and exports hold a copy of it."""
    if not (folder / "config.toml").is_file():
        return False
    _, made_by = read_toml(folder / "config.toml")
    return made_by is not None and not (folder / "model.safetensors").exists()
