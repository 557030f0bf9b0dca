"""The command line: `gptforge` and `python gpt.py`. Without a command it trains.

Torch is imported by the commands that need it, so that `--help` and errors in flags are instant.
"""

import contextlib
import difflib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gptforge import files
from gptforge.cli import (
    bench,
    completion,
    doctor,
    eval,
    export,
    plan,
    prepare,
    runs,
    sample,
    sweep,
    train,
)
from gptforge.errors import (
    DeviceError,
    RunError,
    Terminated,
    UserError,
    explain_device_errors,
    explain_os_errors,
)
from gptforge.printable import print_stderr, printable
from gptforge.shell import program_name, quote

EXIT_USER_ERROR, EXIT_FAILURE = 2, 1
IMPORTLIB = "<frozen importlib._bootstrap>"  # the file of an import's frames, by their code
IMPORT_POLL_SECONDS = 0.05
GOMP_SPINCOUNT = "20000"  # how often an OpenMP thread that waits for others polls before it sleeps

COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], type, str]] = {
    "train": (train.main, train.TrainArgs, "train a model or resume a run; the default command"),
    "prepare": (prepare.main, prepare.PrepareArgs, "turn texts of any kind into token shards"),
    "tokenizer": (prepare.tokenizer_main, prepare.TokenizerArgs, "train a BPE tokenizer on a text"),
    "sample": (sample.main, sample.SampleArgs, "generate text with a trained model"),
    "eval": (eval.main, eval.EvalArgs, "evaluate a trained model on held-out text or tasks"),
    "export": (export.main, export.ExportArgs, "export to transformers, llama.cpp or a Space"),
    "import": (export.import_main, export.ImportArgs, "import from Hugging Face or nanoGPT"),
    "demo": (sample.demo_main, sample.DemoArgs, "serve a model as a web page"),
    "runs": (runs.main, runs.RunsArgs, "list training runs"),
    "compare": (runs.compare_main, runs.CompareArgs, "compare runs, with a verdict"),
    "report": (runs.report_main, runs.ReportArgs, "write the report of a run, one HTML page"),
    "plan": (plan.main, plan.PlanConfig, "show what a run will do and need, and whether it fits"),
    "sweep": (sweep.main, sweep.SweepConfig, "search hyperparameters with many training runs"),
    "bench": (bench.main, bench.BenchConfig, "measure how fast this machine trains and generates"),
    "cache": (prepare.cache_main, prepare.CacheArgs, "show or clear the cache of tokenized texts"),
    "doctor": (doctor.main, doctor.DoctorArgs, "check this machine or a dataset for problems"),
    "completion": (completion.main, completion.CompletionArgs, "print a script for Tab completion"),
}
"""Name -> function, which may return an exit code, its flags, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    _set_up_streams()
    limit_openmp_spinning()
    is_debug = os.environ.get("GPTFORGE_DEBUG") == "1"
    try:
        with (
            explain_os_errors(),
            explain_device_errors(),
            _raise_on_signals(is_program=argv is None),
        ):
            return _run_command(args)
    except (UserError, RunError) as error:
        if is_debug:
            raise
        if not _is_main_rank():
            # All ranks usually fail alike: leave the message to rank 0, unless it gets stuck.
            time.sleep(3)
        print_stderr(f"error: {printable(error)}")
        if isinstance(error, DeviceError) and argv is None:
            # Tensors that are freed while Python shuts down would raise again, in C++.
            sys.stdout.flush()
            os._exit(EXIT_FAILURE)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    except Terminated as stop:
        print(": ".join(["terminated", *stop.args]), file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt as stop:
        if is_debug:
            raise
        if _is_main_rank():  # a terminal interrupts all ranks
            print(": ".join(["interrupted", *stop.args]), file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        files.redirect_to_devnull(sys.stdout)
        return 0
    except MemoryError:
        print("error: this machine has too little memory for that", file=sys.stderr)
        return EXIT_FAILURE


def limit_openmp_spinning() -> None:
    """Let waiting OpenMP threads sleep soon. Must run before torch is imported.

    By default GNU OpenMP, which torch uses on Linux, polls for tens of milliseconds; two training
    runs on the same cores are then a hundred times slower (docs/results/cpu-speed.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = GOMP_SPINCOUNT


def _set_up_streams() -> None:
    # A stream is None if the parent process closed it: read nothing, discard output, do the work.
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None or sys.stderr is None:
        devnull = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        sys.stdout, sys.stderr = sys.stdout or devnull, sys.stderr or devnull
    for stream in (sys.stdout, sys.stderr):
        # A Windows pipe may not support box-drawing characters or those of the text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Invalid UTF-8 is kept, to be reported where it is used.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape", newline="\n")


@contextlib.contextmanager
def _raise_on_signals(*, is_program: bool) -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP instead of ending the process at once.

    Not under torchrun: a rank may be blocked in a collective, where Python handles no signals. An
    import is completed first, also for the KeyboardInterrupt of SIGINT: in the middle of theirs,
    NumPy loses an exception, and torch may abort the process.

    Args:
        is_program: whether the process ends after the body; any later Ctrl-C then ends it at once.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            handlers[signal.SIGINT] = signal.default_int_handler
        if "LOCAL_RANK" not in os.environ:
            existing = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
            numbers = [n for n in existing if n and signal.getsignal(n) is signal.SIG_DFL]
            handlers |= dict.fromkeys(numbers, _raise_terminated)
    waiting: set[int] = set()
    has_ended = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            handlers[number](number, frame)
        elif number not in waiting:
            waiting.add(number)
            threading.Thread(target=send_after_import, args=(number,), daemon=True).start()

    def send_after_import(number: int) -> None:
        main_thread = threading.main_thread().ident or 0
        while _is_importing(sys._current_frames().get(main_thread)):
            if has_ended.wait(IMPORT_POLL_SECONDS):
                return
        waiting.discard(number)
        signal.raise_signal(number)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        has_ended.set()
        for number, handler in handlers.items():
            is_interrupt = handler is signal.default_int_handler
            # Python's own handler would print a traceback while the interpreter shuts down.
            keeps_handler = is_interrupt and not is_program
            signal.signal(number, handler if keeps_handler else signal.SIG_DFL)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame of the running command is in the middle of an import."""
    while frame is not None and frame.f_code is not _run_command.__code__:
        if frame.f_code.co_filename == IMPORTLIB:
            return True
        frame = frame.f_back
    return False


def _raise_terminated(number: int, frame: object) -> NoReturn:
    if number == signal.SIGTERM:
        # A second SIGTERM ends the process at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        files.discard_terminal_output()
        # A SIGTERM that comes with SIGHUP must not cut the cleanup short.
        signal.signal(signal.SIGTERM, _allow_one)
    if hangup := getattr(signal, "SIGHUP", None):
        # The kernel and the shell each send one, systemd sends one with SIGTERM.
        signal.signal(hangup, signal.SIG_IGN)
    raise Terminated


def _allow_one(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)


def _run_command(args: list[str]) -> int:
    try:
        Path.cwd()
    except FileNotFoundError:
        # Torch's math library would end the process with an error of its own.
        raise UserError("the working folder was deleted: change to another one") from None
    if args == ["--version"]:
        from gptforge import __version__

        print(f"gptforge {__version__}")
        return 0
    name, rest = (args[0], args[1:]) if args and not args[0].startswith("-") else ("train", args)
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}'; {_command_hint(name)}")
    if name == "train":
        return train.main(rest, epilog=_command_list())
    if "LOCAL_RANK" in os.environ and not _is_main_rank():
        # Started by torchrun: one process is enough, and several would write the same files.
        return 0
    run, _, _ = COMMANDS[name]
    return run(rest) or 0


def _command_hint(name: str) -> str:
    if Path(name, "checkpoints").is_dir():
        return (
            f"to generate text: sample {quote(name)}, to train it further: --resume {quote(name)}"
        )
    if Path(name).exists():
        return f"to train on that file: --input {quote(name)}"
    is_flag = name in ("help", "version")
    close = [f"--{name}"] if is_flag else difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean '{close[0]}'?" if close else f"there are {', '.join(COMMANDS)}"


def _command_list() -> str:
    lines = [f"  {name:<11}{about}" for name, (_, _, about) in COMMANDS.items()]
    lines += ["", f"{program_name()} --version prints the version.", "", completion.HINT]
    return "\n".join(["", "", f"Commands ({program_name()} COMMAND --help):", *lines])


def _is_main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
