"""A stream of tokens: what a loader cuts its windows from, wherever the tokens lie."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gptforge.errors import UserError, parsing
from gptforge.tokenizers.base import Tokens

MOST_OPEN = 256
"""Shards mapped at a time: each takes a file handle, and a system gives out about a thousand."""


class TokenStream(Protocol):
    """Ids in a row. A plain array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Tokens: ...


@dataclass(frozen=True)
class ShardFile:
    """Where the tokens of one shard lie."""

    path: Path
    dtype: np.dtype[Any]
    tokens: int
    offset: int
    """Bytes before the first token."""


class ShardStream:
    """The tokens of many shards, one behind the other, read where they lie.

    Nothing is held in memory but the list of files; a window may reach over their borders.

    Args:
        shards: in the order of the stream.
        size: ids of the vocabulary; a larger id in a shard is a UserError when it is read.
        start: first token of the stream that belongs to it.
        stop: one behind its last; None: the end.
    """

    def __init__(
        self, shards: Sequence[ShardFile], *, size: int, start: int = 0, stop: int | None = None
    ) -> None:
        # Nothing can be mapped of an empty one.
        self.shards = tuple(shard for shard in shards if shard.tokens)
        self._size = size
        self._begins = [0]
        for shard in self.shards:
            self._begins.append(self._begins[-1] + shard.tokens)
        self._start = start
        self._stop = self._begins[-1] if stop is None else stop
        assert 0 <= self._start <= self._stop <= self._begins[-1]
        self._open: OrderedDict[int, Tokens] = OrderedDict()

    def __len__(self) -> int:
        return self._stop - self._start

    def part(self, start: int, stop: int) -> "ShardStream":
        """A stretch of this stream, as a stream of its own."""
        first = self._start + start
        return ShardStream(self.shards, size=self._size, start=first, stop=self._start + stop)

    def __getitem__(self, where: slice, /) -> Tokens:
        start, stop, step = where.indices(len(self))
        assert step == 1, "a stream is read in its order"
        start, stop = self._start + start, self._start + max(start, stop)
        number = bisect_right(self._begins, start) - 1
        parts: list[Tokens] = []
        while start < stop:
            begin, end = self._begins[number], min(stop, self._begins[number + 1])
            part = self._shard(number)[start - begin : end - begin]
            self._check(part, number)
            parts.append(part)
            start, number = max(start, end), number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _shard(self, number: int) -> Tokens:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= MOST_OPEN:
            self._open.popitem(last=False)
        shard = self.shards[number]
        with parsing(shard.path.as_posix(), "a shard that can still be read"):
            tokens = np.memmap(
                shard.path, shard.dtype, mode="r", offset=shard.offset, shape=(shard.tokens,)
            )
        # A plain view: a memmap's own slices are slow to make.
        view: NDArray[Any] = tokens.view(np.ndarray)
        self._open[number] = view
        return view

    def _check(self, part: Tokens, number: int) -> None:
        """A GPU answers an id that is not in the table with nothing but a device-side assert."""
        if len(part) and (worst := int(part.max())) >= self._size:
            raise UserError(
                f"{self.shards[number].path.as_posix()}: token id {worst} is outside the "
                f"vocabulary of {self._size}: the shard is damaged, or was made with another "
                "tokenizer; say which with --tokenizer"
            )
