"""Errors that are for people. The command line prints each as one line, without a traceback."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptforge.printable import MAX_NAME, printable, short_repr


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, with the values, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(RuntimeError):
    """The run cannot go on, through no mistake in its flags: no disk, no memory, no finite loss."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Terminated(BaseException):
    """SIGTERM, or a closed terminal: a command ends as by Ctrl-C, and cleans up as well."""


@contextmanager
def parsing(source: object, what: str, hint: str = "") -> Iterator[None]:
    """Turn whatever a parser raises into one UserError that names the file.

    Hostile bytes make a parser stumble in ways that nobody lists: a number too large for a float, a
    list where a table should be, half of a surrogate pair, a panic inside a Rust library. A
    UserError gets the name of the file in front, unless it is there; a RunError passes.

    Args:
        source: the file, as the message names it.
        what: what it should be: "a readable TOML file".
        hint: what to do about it.
    """
    try:
        yield
    except UserError as error:
        if str(source) in str(error):
            raise
        raise UserError(_refusal(source, what, str(error), hint)) from error
    except RunError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{source}: there is no such file") from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(_refusal(source, what, error_reason(error), hint)) from error


def is_failure(error: BaseException) -> bool:
    """Whether code failed; False for Ctrl-C and its like, which are to end the program.

    A Rust library's panic comes as `pyo3_runtime.PanicException`, which is no Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def error_reason(error: BaseException) -> str:
    """What an exception says, in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"{short_repr(error.args[0])} is missing"
    says = printable(str(error).strip(), 2 * MAX_NAME)
    if isinstance(error, OSError | ValueError) and says:
        return says
    return f"{type(error).__name__}: {says}" if says else type(error).__name__


def _refusal(source: object, what: str, why: str, hint: str) -> str:
    return f"{source}: not {what} ({why}){': ' if hint else ''}{hint}"


def install_hint(extra: str) -> str:
    """The command that installs the packages of an optional extra, and where to run it."""
    root = Path(__file__).parents[1]
    place = root.as_posix() if (root / "pyproject.toml").is_file() else "a checkout of GPT-Forge"
    return f"pip install -e '.[{extra}]' in {place}"


def require_package(package: str, *, extra: str) -> None:
    """Raise a UserError unless `package` is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"this needs the package {package}, which is not installed: {install_hint(extra)}"
        )
