"""Text as it comes: pieces that end between characters, and before stop texts."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gptforge.tokenizers import Tokenizer


class IncrementalDetokenizer:
    """Ids to text, one at a time; bytes of a character that is not whole yet are held back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The characters that this id completes."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that stayed unfinished."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Watches a text for the first stop text that is complete; of several there, the longest."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._reach = max((len(text) for text in self._stop), default=1) - 1
        self._held = ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        """What of the text so far is settled: it cannot be the beginning of a stop text."""
        self._held += piece
        found = [at + len(text) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.is_stopped = True
            written = self._held[: min(found)]
            self._held = ""
            return min((written.removesuffix(text) for text in self._stop), key=len)
        settled = max(0, len(self._held) - self._reach)
        text, self._held = self._held[:settled], self._held[settled:]
        return text

    def flush(self) -> str:
        """What was held back, if nothing ended the text."""
        return self._held


def truncate_at_stop(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Pieces up to the first stop text; what may be its beginning is held back until settled."""
    ending = StopMatcher(stop)
    for piece in pieces:
        if text := ending.add(piece):
            yield text
        if ending.is_stopped:
            return
    if text := ending.flush():
        yield text


@dataclass(frozen=True)
class Completion:
    """A continuation as a whole."""

    text: str
    """Without the stop text that ended it."""
    ids: list[int]
    """All that were chosen, with those of a stop text."""
    logprobs: list[float]
    """As in `Token`, one an id."""
    finish_reason: Literal["length", "stop"]


class CompletionBuilder:
    """One sequence of a batch: ids to text, until it ends."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: set[int]) -> None:
        self._unfinished, self._ending = IncrementalDetokenizer(tokenizer), StopMatcher(stop)
        self._stop_ids = stop_ids
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self.is_finished = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Take more tokens, up to the one that ends the text."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.is_finished:
                return
            self._ids.append(token)
            self._logprobs.append(logprob)
            self.is_finished = token in self._stop_ids
            if not self.is_finished:
                self._text += self._ending.add(self._unfinished.add(token))
                self.is_finished = self._ending.is_stopped

    def completion(self, with_logprobs: bool) -> Completion:
        """What has been written."""
        if not self._ending.is_stopped:
            # The last bytes may complete a stop text as well.
            self._text += self._ending.add(self._unfinished.flush())
            self._text += "" if self._ending.is_stopped else self._ending.flush()
        is_stopped = self.is_finished or self._ending.is_stopped
        logprobs = self._logprobs if with_logprobs else []
        return Completion(self._text, self._ids, logprobs, "stop" if is_stopped else "length")
