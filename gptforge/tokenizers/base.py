"""What a tokenizer is. Each can write itself down whole, to travel with a checkpoint."""

import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
SAFE_CUT = re.compile(r"[ \n](?=\S)")
"""Where a text may be cut without changing an id: GPT-2's pattern parts every text in front of the
last of several blanks, whether a visible character stands before them or not."""

Tokens = NDArray[np.uint16 | np.uint32]


class Tokenizer(Protocol):
    """Text to ids and back."""

    name: str
    """What `--tokenizer` calls it."""

    vocab_size: int
    """Number of ids that mean something: 0 .. size-1."""

    eot_token: int | None
    """Id of the mark between documents, which no text becomes; None: there is none."""

    prepends_eot: bool
    """Whether the text that it was used for has that mark in front of each document. Not part of
    what the ids mean, and so not of `to_json`."""

    def encode(self, text: str) -> Tokens:
        """Ids of `text`, nothing added; a UserError if it cannot be written in this vocabulary."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`; a cut of the ids may cut a character."""
        ...

    def to_json(self) -> dict[str, object]:
        """Everything needed to build it again, as JSON."""
        ...


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text behind each id, (size,): turns nats per token into bits per byte.

    The mark between documents stands for no text: 0.
    """
    lengths = np.array(
        [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)], np.int64
    )
    if tokenizer.eot_token is not None:
        lengths[tokenizer.eot_token] = 0
    return lengths


def smallest_dtype(vocab_size: int) -> type[np.uint16 | np.uint32]:
    """The narrower of the two token types that holds ids below `size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32
