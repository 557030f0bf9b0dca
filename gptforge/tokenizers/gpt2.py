"""Byte-level BPE as GPT-2 does it, through tiktoken: with the merge list inside the package, and so
without a network, or with one that a user trained.

tiktoken wants a table of bytes to rank. GPT-2's ranks are the 256 bytes, the printable ones first,
then one token for each merge, in order (github.com/openai/gpt-2, encoder.py).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

import numpy as np
import tiktoken

from gptforge.errors import UserError
from gptforge.tokenizers.base import (
    END_OF_TEXT,
    SAFE_CUT,
    Tokens,
    smallest_dtype,
)

# GPT-2's pattern (same source), in the possessive form that tiktoken gives it: it splits alike and
# never backtracks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHUNK_CHARS = 1 << 20


class GPT2Tokenizer:
    """256 bytes, the merges, and the end-of-text mark, which no text becomes: 50,257 ids with
    GPT-2's own merges, which are taken where none are given.
    """

    def __init__(self, merges: Sequence[str] | None = None) -> None:
        own = gpt2_merges()
        self.merges = list(own if merges is None else merges)
        self.name = "gpt2" if self.merges == own else "bpe"
        self.ranks = ranks = _mergeable_ranks(self.merges)
        self.eot_token: int | None = len(ranks)
        self.prepends_eot = False
        self.vocab_size = len(ranks) + 1
        self._dtype = smallest_dtype(self.vocab_size)
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: len(ranks)},
        )

    def encode(self, text: str) -> Tokens:
        """Ids of `text`; an end-of-text mark in it is ordinary characters."""
        try:
            parts = [self._ids(part) for part in _chunks(text)]
        except UnicodeEncodeError:
            # Half of a surrogate pair, which UTF-8 cannot spell.
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def _ids(self, text: str) -> Tokens:
        # A buffer of numbers: making a list of Python's takes as long as the encoding.
        ids: Tokens = self.encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(self._dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`."""
        return self.encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, object]:
        """Kind and merge list."""
        return {"kind": "gpt2", "merges": self.merges}


@functools.cache
def gpt2_merges() -> list[str]:
    """The merge list in this package, one 'left right' pair an entry."""
    text = resources.files("gptforge.tokenizers").joinpath("vocab.bpe").read_text("utf-8")
    return text.split("\n")[1:-1]


def build_vocab(merges: Sequence[str]) -> dict[str, int]:
    """Every token as the merge list spells it, a printable character a byte, to its id."""
    spelled = [*_byte_to_unicode(), *(merge.replace(" ", "", 1) for merge in merges)]
    return {token: number for number, token in enumerate(spelled)}


def _byte_to_unicode() -> dict[str, int]:
    """The character that stands for each byte, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # Each unprintable byte is written as a character from U+0100 on.
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + i): byte for i, byte in enumerate(others)}


def _mergeable_ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """Bytes of each token, to its id."""
    spelled = _byte_to_unicode()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(spelled.values())}
    for merge in merges:
        try:
            token = bytes(spelled[char] for char in merge.replace(" ", "", 1))
        except KeyError as error:
            raise UserError(f"{merge!r} is not a BPE merge ({error})") from None
        if " " not in merge[1:-1]:
            raise UserError(f"{merge!r} is not a BPE merge: it merges nothing")
        if token in ranks:
            raise UserError(f"{merge!r} makes a token that is there already: leave one out")
        ranks[token] = len(ranks)
    return ranks


def _chunks(text: str) -> Iterator[str]:
    """`text` in pieces of about a megabyte, which keeps memory flat."""
    start = 0
    while len(text) - start > CHUNK_CHARS and (cut := SAFE_CUT.search(text, start + CHUNK_CHARS)):
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]
