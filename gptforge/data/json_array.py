"""The elements of a JSON array, one by one, in constant memory."""

import json
from collections.abc import Iterator
from typing import Any

from gptforge.data.bad import BadInput
from gptforge.data.reading import REPLACED, chunks
from gptforge.data.sources import Source
from gptforge.errors import reason

MAX_ELEMENT = 64 * 2**20
"""Characters of an element: one must fit into memory several times."""
BLANKS = " \t\r\n"


def is_array(source: Source, encoding: str) -> bool:
    """Whether a file's first character is the bracket that opens an array."""
    try:
        for chunk in chunks(source, encoding=encoding):
            if text := chunk.text.lstrip(BLANKS):
                return text.startswith("[")
    except BadInput:
        # Whoever reads it says where.
        pass
    return False


def elements(source: Source, encoding: str, notices: set[str]) -> Iterator[tuple[Any, int]]:
    """The elements, and how many bytes of the file were read up to each.

    Raises:
        BadInput: where it is not JSON.
    """
    decode = json.JSONDecoder().raw_decode
    number, needed, expected, text = 0, 0, "[", ""
    waiting: list[str] = []
    for more, reached, is_end in _and_end(source, encoding, notices):
        waiting.append(more)
        needed -= len(more)
        if needed > 0 and not is_end:
            continue
        text, at, waiting = "".join([text, *waiting]), 0, []
        while (at := _behind_blanks(text, at)) < len(text):
            mark, where = text[at], f"{source.name}, behind element {number}"
            if expected == "[" or mark == {"comma": ",", "first": "]"}.get(expected):
                expected = {"[": "first", "first": "end", "comma": "element"}[expected]
                at += 1
            elif expected == "comma" and mark == "]":
                expected, at = "end", at + 1
            elif expected in ("comma", "end"):
                what = "text behind the array" if expected == "end" else "not JSON: no comma"
                raise BadInput(what, where, "one array of objects is read, or one object a line")
            else:
                try:
                    value, stop = decode(text, at)
                except Exception as error:
                    may_go_on = isinstance(error, ValueError) and len(text) - at <= MAX_ELEMENT
                    if may_go_on and not is_end:
                        # It may go on behind what was read; twice as much is tried next.
                        needed = len(text) - at
                        break
                    where = f"{source.name}, element {number + 1}"
                    raise BadInput("not JSON", where, f"correct it ({reason(error)})") from None
                if stop == len(text) and not is_end:
                    # So may a number.
                    break
                number, at, expected = number + 1, stop, "comma"
                yield value, reached
        text = text[at:]
    if expected != "end":
        what = "the array has no end: no ] behind the last element"
        raise BadInput(
            what, source.name, "the file was cut off: fetch it again, or add what is missing"
        )


def _behind_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANKS:
        at += 1
    return at


def _and_end(source: Source, encoding: str, notices: set[str]) -> Iterator[tuple[str, int, bool]]:
    reached = 0
    for chunk in chunks(source, encoding=encoding):
        reached = chunk.reached
        if chunk.is_replaced:
            notices.add(f"{source.name}: {REPLACED}")
        yield chunk.text, reached, False
    yield "", reached, True
