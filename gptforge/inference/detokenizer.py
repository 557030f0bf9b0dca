"""Token ids to text: incrementally, up to a stop string."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptforge.tokenizers import Tokenizer


class IncrementalDetokenizer:
    """Decodes one id at a time; holds back the bytes of an incomplete character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Append an id; returns the characters that it completes."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """U+FFFD if the text ends with an incomplete character, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Finds the first stop string that is complete; the longest, if several end together."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._max_prefix = max((len(text) for text in self._stop), default=1) - 1
        self._pending = ""
        self.is_stopped = False

    def add(self, text: str) -> str:
        """Append text; returns the part that cannot belong to a stop string."""
        self._pending += text
        ends = [at + len(stop) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            text, self._pending = self._pending[: min(ends)], ""
            # The shortest rest is the one without the longest stop string that ends here.
            return min((text.removesuffix(stop) for stop in self._stop), key=len)
        certain = max(0, len(self._pending) - self._max_prefix)
        text, self._pending = self._pending[:certain], self._pending[certain:]
        return text

    def flush(self) -> str:
        """The text held back; empty after a stop string."""
        return self._pending


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt."""

    text: str  # without the stop string
    ids: list[int]  # all sampled ids, including those of the stop string
    logprobs: list[float]  # as in `Token`, one per id; empty if not requested
    finish_reason: Literal["length", "stop"]


class CompletionBuilder:
    """Collects the tokens of one sequence, and their text, until it is finished."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: set[int]) -> None:
        self._detokenizer, self._matcher = IncrementalDetokenizer(tokenizer), StopMatcher(stop)
        self._stop_ids = stop_ids
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self.is_finished = False

    def add(self, token: int, logprob: float = 0.0) -> str:
        """Append a token, unless the text has ended; returns the text that is now certain."""
        if self.is_finished:
            return ""
        self._ids.append(token)
        self._logprobs.append(logprob)
        self.is_finished = token in self._stop_ids
        return "" if self.is_finished else self._match(self._detokenizer.add(token))

    def flush(self) -> str:
        """The text held back; call once."""
        if self._matcher.is_stopped:
            return ""
        # The last bytes may complete a stop string.
        text, rest = self._match(self._detokenizer.flush()), self._matcher.flush()
        self._text += rest
        return text + rest

    def completion(self, with_logprobs: bool) -> Completion:
        """The result; call once."""
        self.flush()
        logprobs = self._logprobs if with_logprobs else []
        return Completion(self._text, self._ids, logprobs, "stop" if self.is_finished else "length")

    def _match(self, text: str) -> str:
        text = self._matcher.add(text)
        self._text += text
        self.is_finished |= self._matcher.is_stopped
        return text
