"""Prompts from outside, read as training reads text files: UTF-8, and CRLF as LF."""

import contextlib
import os


def from_argument(text: str) -> str:
    """A prompt given as a flag: the bytes of a command line are UTF-8, whatever the locale."""
    with contextlib.suppress(UnicodeError):
        text = os.fsencode(text).decode("utf-8")
    return as_in_files(text)


def as_in_files(text: str) -> str:
    """The text as it would be if a file held it: a byte order mark is dropped, CRLF becomes LF."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")
