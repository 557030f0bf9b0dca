"""Checks and conversions of the library's arguments; a UserError says what is expected.

Where a list of strings or numbers is accepted, a single one is, too.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from gptforge.errors import UserError
from gptforge.printable import short_repr


def check_str(value: Any, name: str) -> str:
    """The value, if it is a string."""
    if not isinstance(value, str):
        raise UserError(f"{name} must be a string, not {short_repr(value)}")
    return value


def as_str_list(value: str | Iterable[str] | None, name: str) -> list[str]:
    """A list of strings from one, several or None."""
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable):
        raise UserError(f"{name} must be a string or several, not {short_repr(value)}")
    return [check_str(text, f"each of {name}") for text in value]


def check_non_negative_int(value: Any, name: str) -> int:
    """The value as an int, if it is a non-negative integer."""
    if not is_int(value) or value < 0:
        raise UserError(f"{name} must be a whole number, 0 or more, not {short_repr(value)}")
    return int(value)


def as_int_list(value: int | Iterable[int], name: str, *, below: int | None = None) -> list[int]:
    """A list of non-negative ints from one number or several."""
    numbers = [check_non_negative_int(number, f"each of {name}") for number in _elements(value)]
    if below is not None and (largest := max(numbers, default=0)) >= below:
        raise UserError(f"each of {name} must be below {below}, not {short_repr(largest)}")
    return numbers


def as_seed_list(value: int | Sequence[int | None] | None, count: int) -> list[int | None]:
    """One seed per prompt; None for a random one."""
    if value is None:
        return [None] * count
    seeds = _elements(value)
    if len(seeds) != count:
        raise UserError(f"give one seed per prompt: {count} prompts, {len(seeds)} seeds")
    return seeds


def _elements(value: Any) -> list[Any]:
    """The elements of an iterable, else the value; 0-D tensors and arrays become numbers."""
    # Those are Iterable by their class, but not iterable. Elements of a 1-D tensor are 0-D tensors.
    is_single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    elements = [value] if is_single else value
    return [x.item() if getattr(x, "ndim", 1) == 0 else x for x in elements]


def is_int(value: Any) -> bool:
    """Whether the value is a Python or NumPy integer, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether the value is a finite Python or NumPy number, and neither a bool nor a fraction."""
    is_real = isinstance(value, Real) and not isinstance(value, bool | Fraction)
    try:
        return is_real and math.isfinite(value)
    except OverflowError:  # 10**400 does not fit into a float
        return False


def prompt_from_argv(text: str) -> str:
    """A prompt from the command line, whose bytes are UTF-8 whatever the locale says."""
    with contextlib.suppress(UnicodeError):
        text = os.fsencode(text).decode("utf-8")
    return normalize_prompt(text)


def normalize_prompt(text: str) -> str:
    """Text as the data pipeline reads it: without a byte order mark, with LF for CRLF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
