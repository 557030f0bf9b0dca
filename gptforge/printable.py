"""Escapes untrusted text for a terminal, an error message or Markdown.

File names, tensor names and generated text may hold escape sequences that move the cursor, ring the
bell, rename the window or reverse the reading direction.
"""

import re
import sys
from collections.abc import Sequence
from typing import TextIO

MAX_LINE = 2000  # characters of an error message; longer ones are cut in the middle
MAX_NAME = 200  # characters of a name inside a message

# C0 and C1 controls, bidirectional marks and overrides, line and paragraph separators, lone
# surrogates, annotation marks. Joiners (U+200C, U+200D) stay: emoji and Persian need them.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~&$]")


def printable(text: object, limit: int = MAX_LINE) -> str:
    """Text as one line of at most `limit` characters with control characters escaped."""
    line = re.sub(r"\s*\n\s*", " ", _shorten(str(text), limit))
    return _shorten(_CONTROL.sub(_escape, line), limit)


def short_repr(value: object) -> str:
    """A printable, short `repr` of any value."""
    try:
        return printable(repr(value), MAX_NAME)
    except (ValueError, RecursionError):
        # Python does not format integers of more than 4,300 digits.
        return f"a value of type {type(value).__name__} that is too long to show"


def printable_text(text: str) -> str:
    """Text of any length with control characters escaped except line ends and tabs."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


def terminal_safe(text: str) -> str:
    """Generated text, escaped if stdout is a terminal, as is for a pipe."""
    return printable_text(text) if sys.stdout.isatty() else text


def safe_print(text: object, *, file: TextIO | None = None) -> None:
    """Print and flush with control characters escaped."""
    print(encodable(printable_text(str(text)), file or sys.stdout), file=file, flush=True)


def encodable(text: str, stream: TextIO | None) -> str:
    """Text with a question mark for each character that the encoding of a stream does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; None, or an object with little more than `write`, is not."""
    return bool(getattr(stream, "isatty", bool)())


def print_stderr(text: object) -> None:
    """`safe_print` to standard error, apart from results."""
    safe_print(text, file=sys.stderr)


def escape_markdown(text: object) -> str:
    """One line that Markdown shows literally in a heading, paragraph or table cell."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def code_span(text: object) -> str:
    """One line as a Markdown code span, whatever backticks it holds."""
    line = printable(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[:1] in "` " or line[-1:] in "` " else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def _shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # The end of a message says what to do.
    tail = limit // 3
    return f"{text[: limit - tail - 5]} ... {text[-tail:]}"


def pluralize(count: int, singular: str, plural: str = "") -> str:
    """A count with its noun: '1 document', '2 documents'. By default the plural ends in s."""
    return f"{count:,} {singular if count == 1 else plural or f'{singular}s'}"


def join_first(names: Sequence[str], limit: int) -> str:
    """The first names of a list, and how many there are besides: 'a, b and 4 more'."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
