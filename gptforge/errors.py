"""Errors that the command line prints as one line, without a traceback."""

import errno
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptforge.printable import MAX_NAME, join_first, printable, short_repr

MAX_RUNS = 3
NOTHING_LOST = "no step was made and nothing is lost; the same command starts or resumes the run"
"""What to say of an interruption before the first step."""


class UserError(ValueError):
    """A mistake in the input; the message says what is wrong, with the values, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(RuntimeError):
    """A run cannot continue although its flags are right: no disk, no memory, no finite loss."""

    def __str__(self) -> str:
        return printable(super().__str__())


class DeviceError(RunError):
    """The GPU failed: nothing more can run on it in this process."""


class Terminated(BaseException):
    """SIGTERM or a closed terminal, raised so that a command cleans up as after Ctrl-C."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; the compiler's can be pages long."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def explain_interruption(hint: Callable[[], str]) -> Iterator[None]:
    """Add a hint to Ctrl-C and `Terminated`: what is lost, and what to do next."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        stop.args = (hint(),)
        raise


@contextmanager
def parsing(source: object, what: str, hint: str = "") -> Iterator[None]:
    """Turn any error of a parser into a UserError that names the file.

    Hostile files make parsers fail in unforeseen ways: an overflow, a list instead of a table, half
    a surrogate pair, a panic in a Rust library.

    Args:
        source: the file, as the message names it. A UserError that names it passes unchanged.
        what: what the file should be, such as "a readable TOML file".
        hint: what to do about it.
    """
    try:
        yield
    except RunError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{source}: there is no such file") from error
    except BaseException as error:
        is_user_error = isinstance(error, UserError)
        if not is_failure(error) or (is_user_error and str(source) in str(error)):
            raise
        why = str(error) if is_user_error else error_reason(error)
        raise UserError(f"{source}: not {what} ({why}){': ' if hint else ''}{hint}") from error


def is_failure(error: BaseException) -> bool:
    """Whether code failed; False for Ctrl-C and other requests to end the program.

    A Rust library's panic is a `pyo3_runtime.PanicException`, which is not an Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def error_reason(error: BaseException) -> str:
    """The message of any exception as one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"{short_repr(error.args[0])} is missing"
    message = printable(str(error).strip(), 2 * MAX_NAME)
    if isinstance(error, OSError | ValueError) and message:
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


_OS_ERRORS = {
    "ENOSPC": ("the disk is full", "free some space"),
    "EDQUOT": ("your disk quota is used up", "free some space"),
    "EFBIG": (
        "the file would exceed the size limit",
        "raise the limit (`ulimit -f unlimited`), or use a disk that allows larger files",
    ),
    "EROFS": ("the disk is read-only", "make it writable, or use another"),
    "EACCES": ("permission denied", "change the permissions, or use another path"),
    "EPERM": ("operation not permitted", "change the permissions, or use another path"),
    "EMFILE": ("too many open files", "raise the limit (`ulimit -n 4096`)"),
    "ENFILE": ("too many open files on this machine", "end programs that hold many"),
    "EIO": ("input/output error", "check the disk and its connection"),
    "ENAMETOOLONG": ("the name is longer than file systems allow", "use a shorter one"),
}
"""What happened and how to fix it, by the name of the error number."""


def explain_os_error(error: Exception) -> tuple[str, str]:
    """The reason of a failed file operation, and how to fix it; no fix if it is unknown.

    Args:
        error: an OSError, or the error of a Rust library with "(os error N)" in its message.
    """
    number = error.errno if isinstance(error, OSError) else None
    # The errors of Rust libraries have the number in their message.
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    name = errno.errorcode.get(number or 0, "")
    return _OS_ERRORS.get(name, (error_reason(error), ""))


@contextmanager
def explain_os_errors() -> Iterator[None]:
    """Turn an OSError that nothing else has explained into a RunError with one line.

    If a name is too long it is a UserError. Also a decorator.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has finished
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason, fix = explain_os_error(error)
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{where}{reason}: {fix}") from error
        hint = f": {fix}, then run the same command again" if fix else ""
        raise RunError(f"{where}{reason}{hint}") from error


@contextmanager
def explain_device_errors() -> Iterator[None]:
    """Turn a lack of memory or a failure of the device into a RunError with one line."""
    try:
        yield
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or isinstance(error, RunError):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise RunError(
                f"the device has too little memory for that ({first_line(error)}): end other "
                "programs that use it, or use another --device"
            ) from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(device_failure(error)) from error
        raise


def device_failure(error: Exception) -> str:
    """What to say of a torch.AcceleratorError, whose other lines are hints for CUDA programmers."""
    return f"the GPU failed: {first_line(error)}"


def install_hint(extra: str) -> str:
    """The command that installs an optional extra."""
    root = Path(__file__).parents[1]
    place = root.as_posix() if (root / "pyproject.toml").is_file() else "a checkout of GPT-Forge"
    return f"pip install -e '.[{extra}]' in {place}"


def require_package(package: str, *, extra: str) -> None:
    """Raise a UserError unless an optional package is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"this needs the package {package}, which is not installed: {install_hint(extra)}"
        )


def runs_hint() -> str:
    """Which runs there are in `runs`, newest first, for messages about a missing one."""
    folders = sorted(Path("runs").glob("*/checkpoints"), key=lambda path: -path.stat().st_mtime)
    names = [folder.parent.as_posix() for folder in folders]
    if not names:
        return "there is none in runs: train one first"
    return f"there {'are' if len(names) > 1 else 'is'} {join_first(names, MAX_RUNS)}"
