"""One continuation: tokens come in, text, ids and the way it ended go out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptforge.generate.streaming import Ending, Unfinished
from gptforge.tokenizers import Tokenizer


@dataclass(frozen=True)
class Writing:
    """A continuation as a whole."""

    text: str
    """Without the stop text that ended it."""
    ids: list[int]
    """All that were chosen, with those of a stop text."""
    logprobs: list[float]
    """As in `Token`, one an id."""
    ended: Literal["length", "stop"]


class Row:
    """One sequence of a batch: ids to text, until it ends."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: set[int]) -> None:
        self._unfinished, self._ending = Unfinished(tokenizer), Ending(stop)
        self._stop_ids = stop_ids
        self._text = ""
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self.is_ended = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Take more tokens, up to the one that ends the text."""
        for token, logprob in zip(ids, logprobs, strict=True):
            if self.is_ended:
                return
            self._ids.append(token)
            self._logprobs.append(logprob)
            self.is_ended = token in self._stop_ids
            if not self.is_ended:
                self._text += self._ending.add(self._unfinished.add(token))
                self.is_ended = self._ending.is_reached

    def writing(self, with_logprobs: bool) -> Writing:
        """What has been written."""
        if not self._ending.is_reached:
            # The last bytes may complete a stop text as well.
            self._text += self._ending.add(self._unfinished.end())
            self._text += "" if self._ending.is_reached else self._ending.end()
        is_stopped = self.is_ended or self._ending.is_reached
        logprobs = self._logprobs if with_logprobs else []
        return Writing(self._text, self._ids, logprobs, "stop" if is_stopped else "length")
