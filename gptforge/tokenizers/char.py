"""One id for each distinct character of the training text, or one for each byte."""

from collections.abc import Iterable

import numpy as np

from gptforge.errors import UserError
from gptforge.tokenizers.base import Tokens, smallest_dtype


class CharTokenizer:
    """The alphabet of one text, in code point order."""

    name = "char"

    def __init__(self, alphabet: str) -> None:
        if sorted(set(alphabet)) != list(alphabet):
            raise UserError("tokenizer: an alphabet is distinct characters in code point order")
        self.alphabet = alphabet
        self.size = len(alphabet)
        self._points = _code_points(alphabet)

    @classmethod
    def of(cls, text: str) -> "CharTokenizer":
        """The tokenizer that knows the characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tokens:
        """Ids of `text`; a UserError names the first character that is not in the alphabet."""
        points = _code_points(text)
        ids = np.searchsorted(self._points, points)
        known = np.zeros(len(points), bool)
        inside = ids < self.size
        known[inside] = self._points[ids[inside]] == points[inside]
        if not known.all():
            stranger = text[int(np.argmin(known))]
            raise UserError(f"the character {stranger!r} is not in this model's alphabet")
        return ids.astype(smallest_dtype(self.size))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of `ids`."""
        return "".join(self.alphabet[i] for i in ids).encode("utf-8")

    def to_json(self) -> dict[str, object]:
        """Kind and alphabet."""
        return {"kind": "char", "alphabet": self.alphabet}


class ByteTokenizer:
    """The 256 bytes of UTF-8: any text, no vocabulary."""

    name = "byte"
    size = 256

    def encode(self, text: str) -> Tokens:
        """UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes themselves."""
        return bytes(int(i) for i in ids)

    def to_json(self) -> dict[str, object]:
        """Kind alone."""
        return {"kind": "byte"}


def _code_points(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
