"""One id per distinct character of the training text, or one per byte.

Either may have one more id, the last, for the end-of-text token between documents.
"""

from collections.abc import Iterable

import numpy as np

from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, Tokens, code_points, smallest_dtype


class CharTokenizer:
    """The alphabet of one text, in code point order."""

    name = "char"

    def __init__(self, alphabet: str, *, with_eot: bool = False) -> None:
        if sorted(set(alphabet)) != list(alphabet):
            raise UserError("an alphabet is distinct characters in code point order")
        if any("\ud800" <= char <= "\udfff" for char in alphabet):
            raise UserError("an alphabet cannot contain lone surrogates: UTF-8 cannot encode them")
        self.alphabet = alphabet
        self.eot_token = len(alphabet) if with_eot else None
        self.prepends_eot = with_eot
        self.vocab_size = len(alphabet) + with_eot
        # Larger than any code point, so that every search ends at an index.
        self._points = np.append(code_points(alphabet), np.uint32(2**32 - 1))

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters in a text."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> Tokens:
        """Ids of a text; a UserError names the first character that is not in the alphabet."""
        points = code_points(text)
        ids = np.searchsorted(self._points, points)
        known = self._points[ids] == points
        if not known.all():
            unknown = text[int(np.argmin(known))]
            raise UserError(
                f"the character {unknown!r} is not in this model's alphabet, the "
                f"{len(self.alphabet)} characters of its training text: leave it out"
            )
        return ids.astype(smallest_dtype(self.vocab_size))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of ids."""
        return "".join(
            END_OF_TEXT if i == self.eot_token else self.alphabet[i] for i in ids
        ).encode("utf-8")

    def to_json(self) -> dict[str, object]:
        """The alphabet, and whether there is an end-of-text token."""
        return {"kind": "char", "alphabet": self.alphabet, **_eot_entry(self.eot_token)}


class ByteTokenizer:
    """The 256 bytes of UTF-8: encodes any text, needs no vocabulary."""

    name = "byte"

    def __init__(self, *, with_eot: bool = False) -> None:
        self.eot_token = 256 if with_eot else None
        self.prepends_eot = with_eot
        self.vocab_size = 256 + with_eot

    def encode(self, text: str) -> Tokens:
        """UTF-8 bytes of a text."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The ids as bytes."""
        eot = END_OF_TEXT.encode()
        return b"".join(eot if i == self.eot_token else bytes([int(i)]) for i in ids)

    def to_json(self) -> dict[str, object]:
        """Whether there is an end-of-text token."""
        return {"kind": "byte", **_eot_entry(self.eot_token)}


def _eot_entry(eot_token: int | None) -> dict[str, object]:
    # Absent rather than false, as in the files of earlier versions.
    return {} if eot_token is None else {"marks": True}
