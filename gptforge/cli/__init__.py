"""The command line: `gptforge` and `python gpt.py`. With no command it trains.

Nothing heavy is imported before it is needed, so that `--help` and a mistyped flag answer at once.
"""

import contextlib
import difflib
import io
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from gptforge import files
from gptforge.cli.bench import bench
from gptforge.cli.demo import demo
from gptforge.cli.doctor import doctor
from gptforge.cli.eval import evaluate
from gptforge.cli.export import export, import_
from gptforge.cli.flags import expand_bool_flags, parse_train_args, resolve_preset
from gptforge.cli.plan import plan
from gptforge.cli.prepare import prepare
from gptforge.cli.sample import sample
from gptforge.cli.tokenizer import tokenizer
from gptforge.config import Config
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError, Terminated, UserError
from gptforge.printable import print_stderr, printable, safe_print
from gptforge.shell import env_int, program_name, quote, torchrun_target

EXIT_USER_ERROR, EXIT_FAILURE = 2, 1
START_TIME = time.monotonic()
"""`--time_limit` counts from here: loading torch and preparing the text take their share."""
GOMP_SPINCOUNT = "20000"
"""How often a thread that waits for the others of a sum looks again before it sleeps."""


def limit_openmp_spinning() -> None:
    """Before torch is loaded: threads that wait must not keep a core from another program for long.

    GNU's OpenMP, which torch has on Linux, lets them look for tens of milliseconds otherwise; two
    trainings at once then take a hundred times as long. docs/results/cpu-speed.md has the figures.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = GOMP_SPINCOUNT


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None or sys.stderr is None:
        # Closed before we came: what is said goes nowhere, and what is done is done all the same.
        nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        # A Windows pipe may not know the summary's lines or a text's letters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As files are read: what is not UTF-8 is kept, to be named where it is used.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")
    is_traced = os.environ.get("GPTFORGE_DEBUG") == "1"
    limit_openmp_spinning()
    try:
        with _heeding_signals():
            return _dispatch(args)
    except (UserError, RunError) as error:
        if is_traced:
            raise
        if not _is_first():
            # All ranks were started alike: the first one says it, if the launcher lets it live.
            time.sleep(3)
        print_stderr(f"error: {printable(error)}")
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    except Terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        if is_traced:
            raise
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        files.redirect_to_devnull(sys.stdout)
        return 0
    except MemoryError:
        print("error: this machine has too little memory for that", file=sys.stderr)
        return EXIT_FAILURE
    except OSError as error:
        if is_traced:
            raise
        # A disk that fails, fills up or turns read-only under us; what was saved is whole.
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or str(error)
        if error.errno in files.DISK_FULL_ERRNOS:
            what = "the disk is full: make room, then give the same command again"
        print_stderr(f"error: {printable(where + what)}")
        return EXIT_FAILURE


@contextlib.contextmanager
def _heeding_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raised, where they would end the process on the spot.

    Not under torchrun: a rank may wait for others where Python is not asked.
    """
    here = threading.current_thread() is threading.main_thread() and "LOCAL_RANK" not in os.environ
    names = [name for name in ("SIGTERM", "SIGHUP") if here and hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    heeded = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in heeded:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: object) -> NoReturn:
    # A second one ends it at once.
    signal.signal(number, signal.SIG_DFL)
    if number != signal.SIGTERM:
        # The terminal is gone: whoever wrote to it would fail.
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                files.redirect_to_devnull(stream)
    raise Terminated


def _dispatch(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        if args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if Path(args[0]).exists():
                raise UserError(
                    f"there is no command '{args[0]}'; to learn from that file: "
                    f"--input {quote(args[0])}"
                )
            if args[0] == "help":
                near = ["--help"]
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command '{args[0]}'; {hint}")
        if args[0] != "train" and "LOCAL_RANK" in os.environ and not _is_first():
            # torchrun has started several; one is enough, and two would write the same files.
            return 0
        return COMMANDS[args[0]](args[1:])
    if args == ["--version"]:
        from gptforge import __version__

        print(f"gptforge {__version__}")
        return 0
    return train(args)


def train(args: list[str]) -> int:
    """`gptforge [train]`: train a model, or go on with one."""
    config, given = parse_train_args(args, epilog=_about_commands())
    prewarm_cuda(config.device)
    # Read before training: a variable that is no number must not cost the end of a run.
    restarts = env_int("TORCHELASTIC_MAX_RESTARTS", 0)
    say = _say if _is_first() else lambda text: None
    config = resolve_preset(config, given, log=say)
    import torch

    from gptforge.distributed import init_distributed

    # Before anything that may take long: from here on this rank gives signs of life.
    ranks = init_distributed(config.device)
    try:
        from gptforge.builders import build_trainer
        from gptforge.train.signals import EXIT_CODES

        trainer = build_trainer(
            config,
            explicit=given,
            program=program_name(),
            command=shlex.join(args),
            log=say,
            comm=ranks,
            start_time=START_TIME,
        )
        reason = trainer.fit() if trainer else "finished"
        ranks.shutdown()
    except torch.OutOfMemoryError:
        error = RunError(
            f"the device ran out of memory with --batch_size {config.batch_size}: leave it out, "
            "and the program finds one that fits and learns the same"
        )
        ranks.abort(error)
        raise error from None
    except BaseException as error:
        ranks.abort(error)
        raise
    if reason == "time_limit" and ranks.is_main:
        print(f"The time limit of {config.time_limit:g} minutes is reached, and all is saved.")
    if reason != "finished" and ranks.is_main:
        safe_print(f"To go on: {_launcher(os.environ)} {_quote(args)}".rstrip())
    # torchrun would start again what was told to stop.
    is_restarted = restarts > 0
    return ranks.exit(0 if is_restarted else EXIT_CODES[reason])


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "prepare": prepare,
    "tokenizer": tokenizer,
    "sample": sample,
    "eval": evaluate,
    "export": export,
    "import": import_,
    "demo": demo,
    "plan": plan,
    "bench": bench,
    "doctor": doctor,
}


ABOUT = {
    "train": "train a model, or go on with one; also without a word",
    "prepare": "turn texts of any kind and size into token shards",
    "tokenizer": "learn a vocabulary from your own text",
    "sample": "write with a trained model",
    "eval": "judge a trained model by text it has not learned",
    "export": "for transformers, llama.cpp, or a Hugging Face Space",
    "import": "take a GPT-2 of other programs in",
    "demo": "show a model on a web page",
    "plan": "what a run will be and cost, and whether it fits",
    "bench": "how fast this machine trains and writes",
    "doctor": "what this machine can do, and what is wrong with a text",
}


def _about_commands() -> str:
    lines = [f"  {name:<11}{about}" for name, about in ABOUT.items()]
    return "\n".join(["", "", "Commands (gptforge COMMAND --help):", *lines])


def _launcher(env: Mapping[str, str]) -> str:
    """The same, with the launcher that started several processes, as far as it can be known."""
    each, size = env.get("LOCAL_WORLD_SIZE", "N"), env.get("WORLD_SIZE", "1")
    if env_int("WORLD_SIZE", 1, env) < 2:
        return program_name()
    nodes = "" if each == size else "... "
    return f"torchrun {nodes}--nproc_per_node={each} {torchrun_target()}"


def _is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    from gptforge.report.console import PlainConsole

    PlainConsole().log(text)


def _quote(args: Sequence[str]) -> str:
    # --overwrite would throw away what is to be gone on with.
    kept = expand_bool_flags(Config, args)
    kept = [word for word in kept if not word.startswith("--overwrite=")]
    while "--overwrite" in kept:
        place = kept.index("--overwrite")
        del kept[place : place + 2]
    return shlex.join(kept)
