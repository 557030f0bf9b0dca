"""Text as it comes: pieces that end between characters, and before stop texts."""

import codecs
from collections.abc import Iterable, Iterator, Sequence

from gptforge.tokenizers import Tokenizer


class Unfinished:
    """Ids to text, one at a time; bytes of a character that is not whole yet are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this id completes."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def end(self) -> str:
        """What is left: U+FFFD for a character that stayed unfinished."""
        return self._decoder.decode(b"", final=True)


class Ending:
    """Watches a text for the first stop text that is complete; of several there, the longest."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._reach = max((len(text) for text in self._stop), default=1) - 1
        self._held = ""
        self.is_reached = False

    def add(self, piece: str) -> str:
        """What of the text so far is settled: it cannot be the beginning of a stop text."""
        self._held += piece
        found = [at + len(text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.is_reached = True
            written = self._held[: min(found)]
            self._held = ""
            return min((written.removesuffix(text) for text in self._stop), key=len)
        settled = max(0, len(self._held) - self._reach)
        text, self._held = self._held[:settled], self._held[settled:]
        return text

    def end(self) -> str:
        """What was held back, if nothing ended the text."""
        return self._held


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop text; what may be its beginning is held back until settled."""
    ending = Ending(stop)
    for piece in pieces:
        if text := ending.add(piece):
            yield text
        if ending.is_reached:
            return
    if text := ending.end():
        yield text
