"""Text of files and models, made fit for a terminal, an error line or Markdown.

A file name, a tensor's name or a generated text may hold escape sequences that move the cursor,
ring the bell, rename the window or reverse the reading direction. Here they become visible.
"""

import re
import sys
from typing import TextIO

MAX_LINE = 2000
"""Characters of an error line; what is longer loses its middle."""
MAX_NAME = 200
"""Characters of a name inside a line."""

# C0 and C1 controls, bidirectional marks and overrides, line and paragraph separators, lone
# surrogates, annotation marks. Joiners (U+200C, U+200D) stay: emoji and Persian are made of them.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~&$]")


def printable(text: object, limit: int = MAX_LINE) -> str:
    """One line: control characters escaped as in a Python string, shortened in its middle."""
    line = re.sub(r"\s*\n\s*", " ", _shortened(str(text), limit))
    return _shortened(_CONTROL.sub(_escape, line), limit)


def short_repr(value: object) -> str:
    """A value of a stranger's file, for an error: `repr`, short, and whatever the value is."""
    try:
        return printable(repr(value), MAX_NAME)
    except (ValueError, RecursionError):
        # Python refuses to spell out an integer of more than 4,300 digits.
        return f"a value of type {type(value).__name__} that is too long to show"


def printable_text(text: str) -> str:
    """Text of any length, with its line ends and tabs; other control characters are escaped."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found), text)


def terminal_safe(text: str, stream: TextIO | None = None) -> str:
    """Generated text for a stream (None: stdout): a terminal gets `printable_text`, a pipe all."""
    return printable_text(text) if (stream or sys.stdout).isatty() else text


def safe_print(text: object, *, file: TextIO | None = None) -> None:
    """`print` at once, with control characters escaped."""
    print(printable_text(str(text)), file=file, flush=True)


def print_stderr(text: object) -> None:
    """The same on standard error, where what is said does not mix with results."""
    safe_print(text, file=sys.stderr)


def escape_markdown(text: object) -> str:
    """One line that Markdown shows as it is: in a heading, a paragraph or a cell of a table."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def code_span(text: object) -> str:
    """One line as Markdown's inline code, whatever backticks are in it."""
    line = printable(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line[:1] in "` " or line[-1:] in "` " else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    # The end of a message says what to do.
    tail = limit // 3
    return f"{text[: limit - tail - 5]} ... {text[-tail:]}"


def pluralize(count: int, singular: str, plural: str) -> str:
    """A number of things in words: '1 document', '2 documents'."""
    return f"{count:,} {singular if count == 1 else plural}"
