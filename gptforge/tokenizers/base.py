"""The tokenizer protocol, and what all tokenizers share."""

import re
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
SAFE_CUT = re.compile(r"[ \n](?=\S)")
"""Where a text may be cut without changing a token: GPT-2's pattern splits every text before the
last of several spaces, whatever comes before them."""

Tokens = NDArray[np.uint16 | np.uint32]


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: as `--tokenizer` calls it.
        vocab_size: ids are 0 .. vocab_size - 1.
        eot_token: id of the separator between documents, which no text encodes to, if any.
        prepends_eot: whether each document of the training text follows that separator. It does
            not change the ids, so it is not part of `to_json`.
    """

    name: str
    vocab_size: int
    eot_token: int | None
    prepends_eot: bool

    def encode(self, text: str) -> Tokens:
        """Ids of a text, without special tokens; a UserError if the vocabulary lacks it."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids; they may start or end within a character."""
        ...

    def to_json(self) -> dict[str, object]:
        """Everything needed to rebuild it, as JSON."""
        ...


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, in the order of the ids (its encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of ids; bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")


def byte_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text per id, (vocab_size,), to convert nats per token into bits per byte.

    The end-of-text token counts as 0: it is not text.
    """
    return _lengths(tokenizer, len)


def char_lengths(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Characters of text per id, (vocab_size,); one that spans tokens counts where it starts."""
    # In UTF-8, all bytes of a character but the first are 0b10xxxxxx.
    return _lengths(tokenizer, lambda text: sum(byte & 0xC0 != 0x80 for byte in text))


def _lengths(tokenizer: Tokenizer, measure: Callable[[bytes], int]) -> NDArray[np.int64]:
    lengths = [measure(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
    if tokenizer.eot_token is not None:
        lengths[tokenizer.eot_token] = 0
    return np.array(lengths, np.int64)


def code_points(text: str) -> NDArray[np.uint32]:
    """The Unicode code point of each character; lone surrogates have one, too."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


def smallest_dtype(vocab_size: int) -> type[np.uint16 | np.uint32]:
    """The smaller token type that holds ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32
