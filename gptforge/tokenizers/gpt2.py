"""Byte-level BPE with GPT-2's pattern, by tiktoken: the bundled GPT-2 merges, or a user's own.

tiktoken needs the rank of each token's bytes. GPT-2's ranks are the 256 bytes, the printable ones
first, then one token per merge, in order (github.com/openai/gpt-2, encoder.py).
"""

import functools
from collections.abc import Iterable, Sequence
from importlib import resources

import tiktoken

from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, Tokens, bytes_to_unicode, smallest_dtype

# GPT-2's pattern (same source) with tiktoken's possessive quantifiers: the same splits without
# backtracking.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class GPT2Tokenizer:
    """256 bytes, the merges, and the end-of-text token: 50,257 ids with GPT-2's merges.

    Args:
        merges: "left right" pairs, by default GPT-2's.
    """

    def __init__(self, merges: Sequence[str] | None = None) -> None:
        gpt2 = gpt2_merges()
        self.merges = list(gpt2 if merges is None else merges)
        self.name = "gpt2" if self.merges == gpt2 else "bpe"
        self.encoding, self.ranks = _encoding(tuple(self.merges))
        self.eot_token: int | None = len(self.ranks)
        self.prepends_eot = False
        self.vocab_size = len(self.ranks) + 1
        self._dtype = smallest_dtype(self.vocab_size)

    def encode(self, text: str) -> Tokens:
        """Ids of a text, in which <|endoftext|> is ordinary characters."""
        try:
            # To numpy: a list of Python integers would take as long as the encoding.
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            # A lone surrogate, which UTF-8 cannot encode.
            return self.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return ids.astype(self._dtype)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids."""
        return self.encoding.decode_bytes(list(ids))

    def to_json(self) -> dict[str, object]:
        """The merges."""
        return {"kind": "gpt2", "merges": self.merges}


@functools.cache
def gpt2_merges() -> list[str]:
    """GPT-2's merges, one "left right" pair each."""
    text = resources.files("gptforge.tokenizers").joinpath("vocab.bpe").read_text("utf-8")
    return text.split("\n")[1:-1]


@functools.lru_cache(maxsize=2)  # 0.13 s for GPT-2's, which a run needs several times
def _encoding(merges: tuple[str, ...]) -> tuple[tiktoken.Encoding, dict[bytes, int]]:
    ranks = _mergeable_ranks(merges)
    special_tokens = {END_OF_TEXT: len(ranks)}
    encoding = tiktoken.Encoding(
        name="gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    return encoding, ranks


def build_vocab(merges: Sequence[str]) -> dict[str, int]:
    """Hugging Face's `vocab`: every token, with a printable character per byte, and its id."""
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "", 1) for merge in merges)]
    return {token: i for i, token in enumerate(tokens)}


def _mergeable_ranks(merges: Sequence[str]) -> dict[bytes, int]:
    """The bytes of each token, and its id."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(bytes_to_unicode())}
    for merge in merges:
        try:
            token = bytes(byte_of[char] for char in merge.replace(" ", "", 1))
        except KeyError as error:
            raise UserError(f"{merge!r} is not a BPE merge ({error})") from None
        if " " not in merge[1:-1]:
            raise UserError(f"{merge!r} is not a BPE merge: it merges nothing")
        if token in ranks:
            raise UserError(f"{merge!r} makes a token that is there already: leave one out")
        ranks[token] = len(ranks)
    return ranks
