"""GPT-2's byte-level BPE through tiktoken, from the merge list inside the package: no network.

tiktoken wants a table of bytes to rank. GPT-2's ranks are the 256 bytes, the printable ones first,
then one token for each merge, in order (github.com/openai/gpt-2, encoder.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib import resources

import numpy as np
import tiktoken

from gptforge.errors import UserError
from gptforge.tokenizers.base import CLEFT, END_OF_TEXT, Tokens

# GPT-2's pattern (same source), in the possessive form that tiktoken gives it: it splits alike and
# never backtracks.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHUNK = 1 << 20


class GPT2Tokenizer:
    """50,257 ids: 256 bytes, 50,000 merges and the end-of-text mark, which no text becomes."""

    name = "gpt2"

    def __init__(self, merges: Sequence[str] | None = None) -> None:
        self.merges = list(merges) if merges is not None else bundled_merges()
        self.ranks = ranks = _ranks(self.merges)
        self.end_of_text: int | None = len(ranks)
        self.size = len(ranks) + 1
        self._encoding = tiktoken.Encoding(
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
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _ids(self, text: str) -> Tokens:
        # A buffer of numbers: making a list of Python's takes as long as the encoding.
        ids: Tokens = self._encoding.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`."""
        return self._encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, object]:
        """Kind and merge list."""
        return {"kind": "gpt2", "merges": self.merges}


def bundled_merges() -> list[str]:
    """The merge list in this package, one 'left right' pair an entry."""
    text = resources.files("gptforge.tokenizers").joinpath("vocab.bpe").read_text("utf-8")
    return text.split("\n")[1:-1]


def _ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """Bytes of each token, to its id."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # The file writes each unprintable byte as a character from U+0100 on.
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*printable, *others])}
    for merge in merges:
        try:
            token = bytes(spelled[char] for char in merge.replace(" ", "", 1))
        except KeyError as error:
            raise UserError(f"tokenizer: {merge!r} is not a BPE merge ({error})") from None
        ranks[token] = len(ranks)
    return ranks


def _chunks(text: str) -> Iterator[str]:
    """`text` in pieces of about a megabyte, which keeps memory flat."""
    start = 0
    while len(text) - start > CHUNK and (cut := CLEFT.search(text, start + CHUNK)):
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]
