"""What a caller gives, in the form that is worked with, or a UserError that says what is wanted.

One text where several may stand is that text, not its characters; likewise one number.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from gptforge.errors import UserError


def check_str(given: Any, name: str) -> str:
    """A text."""
    if not isinstance(given, str):
        raise UserError(f"{name} must be a string, not {_shown(given)}")
    return given


def check_utf8(text: str, name: str) -> None:
    """Raise a UserError for halves of characters, as bytes that are no UTF-8 come to be."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not UTF-8 text, at character {error.start}") from None


def as_str_list(given: str | Iterable[str] | None, name: str) -> list[str]:
    """Texts, of one or of several; None is none."""
    if given is None:
        return []
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Iterable):
        raise UserError(f"{name} must be a string or several, not {_shown(given)}")
    return [check_str(text, f"each of {name}") for text in given]


def check_non_negative_int(given: Any, name: str) -> int:
    """A whole number that is not negative."""
    if not is_int(given) or given < 0:
        raise UserError(f"{name} must be a whole number, 0 or more, not {_shown(given)}")
    return int(given)


def as_int_list(given: int | Iterable[int], name: str, *, below: int | None = None) -> list[int]:
    """Whole numbers from 0, of one or of several."""
    several = given if isinstance(given, Iterable) else [given]
    numbers = [check_non_negative_int(_plain(number), f"each of {name}") for number in several]
    if below is not None and (high := max(numbers, default=0)) >= below:
        raise UserError(f"each of {name} must be below {below}, not {high}")
    return numbers


def as_seed_list(given: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    """One seed a prompt; None throws fresh dice."""
    if given is None:
        return [None] * count
    seeds: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if len(seeds) != count:
        raise UserError(f"give one seed a prompt: {count} prompts, {len(seeds)} seeds")
    return seeds


def is_int(given: Any) -> bool:
    """Whether it is a whole number, numpy's among them; True and False are none."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def is_number(given: Any) -> bool:
    """Whether it is a number, numpy's among them; True and False are none."""
    return isinstance(given, Real) and not isinstance(given, bool)


def _plain(number: Any) -> Any:
    """A number of torch's in Python's form."""
    return number.item() if hasattr(number, "item") else number


def _shown(given: Any) -> str:
    shown = repr(given)
    return shown if len(shown) < 50 else f"{shown[:50]}…"


def prompt_from_argv(text: str) -> str:
    """A prompt given as a flag: the bytes of a command line are UTF-8, whatever the locale."""
    with contextlib.suppress(UnicodeError):
        text = os.fsencode(text).decode("utf-8")
    return normalize_prompt(text)


def normalize_prompt(text: str) -> str:
    """The text as it would be if a file held it: a byte order mark is dropped, CRLF becomes LF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
