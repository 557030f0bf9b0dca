"""A stream of tokens: what a loader cuts its windows from, wherever the tokens lie."""

import os
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptforge import files
from gptforge.errors import UserError, parsing
from gptforge.files import open_regular
from gptforge.tokenizers.base import Tokens

MAX_OPEN_SHARDS = 256
"""Shards open at a time: a system gives out about a thousand file handles."""
MAX_IN_MEMORY_BYTES = 2**26
"""Bytes of a stream that is read into memory as a whole."""


class TokenDataset(Protocol):
    """Ids in a row. A plain array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Tokens: ...


@dataclass(frozen=True)
class ShardFile:
    """Where the tokens of one shard lie."""

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    offset: int
    """Bytes before the first token."""


class ShardReader:
    """A shard that is open for reading at any offset, by several threads at once.

    It is not memory-mapped: a file that is truncated while it is mapped ends the process with
    SIGBUS. Reading costs about a microsecond more per window than copying out of a mapping.

    Args:
        shard: what to open.
        in_memory: whether to read all of it now.

    Raises:
        UserError: if the file is missing, or shorter than the shard.
    """

    def __init__(self, shard: ShardFile, *, in_memory: bool = False) -> None:
        self._shard = shard
        self._tokens: Tokens | None = None
        try:
            self._file = open_regular(shard.path, buffering=0)
        except OSError as error:
            raise self._unreadable(str(error.strerror)) from None
        self._descriptor = self._file.fileno()
        size = os.fstat(self._descriptor).st_size
        if size < shard.offset + shard.num_tokens * shard.dtype.itemsize:
            raise self._unreadable("it is truncated")
        if in_memory:
            self._tokens = self.read(0, shard.num_tokens)
            self._file.close()

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the shard."""
        if self._tokens is not None:
            return self._tokens[start:stop]
        shard, width = self._shard, self._shard.dtype.itemsize
        wanted, offset = width * (stop - start), shard.offset + width * start
        try:
            data = _pread(self._descriptor, wanted, offset)
            while 0 < len(data) < wanted and (more := self._more(data, wanted, offset)):
                # A system reads 2 GB at a time.
                data += more
        except OSError as error:
            raise self._unreadable(str(error.strerror)) from None
        if len(data) < wanted:
            raise self._unreadable("it was truncated while it was in use")
        tokens: Tokens = np.frombuffer(data, shard.dtype)
        return tokens

    def _more(self, data: bytes, wanted: int, offset: int) -> bytes:
        return _pread(self._descriptor, wanted - len(data), offset + len(data))

    def _unreadable(self, why: str) -> UserError:
        name = self._shard.path.as_posix()
        return UserError(f"{name}: cannot be read any more: {why}; make or fetch it again")


if sys.platform == "win32":
    _lock = threading.Lock()

    def _pread(descriptor: int, length: int, offset: int) -> bytes:
        """The same as os.pread, which Windows lacks."""
        with _lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, length)
else:
    _pread = os.pread


class ShardDataset:
    """The tokens of many shards, one behind the other, read where they lie.

    A large stream holds nothing in memory but the list of files; a window may reach over their
    borders.

    Args:
        shards: in the order of the stream.
        size: ids of the vocabulary; a larger id in a shard is a UserError when it is read.
        start: first token of the stream that belongs to it.
        stop: one behind its last; None: the end.
    """

    def __init__(
        self,
        shards: Sequence[ShardFile],
        *,
        vocab_size: int,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.shards = tuple(shard for shard in shards if shard.num_tokens)
        self._size = vocab_size
        self._begins = [0]
        for shard in self.shards:
            self._begins.append(self._begins[-1] + shard.num_tokens)
        sizes = (shard.num_tokens * shard.dtype.itemsize for shard in self.shards)
        self._in_memory = sum(sizes) <= MAX_IN_MEMORY_BYTES
        self._start = start
        self._stop = self._begins[-1] if stop is None else stop
        assert 0 <= self._start <= self._stop <= self._begins[-1]
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def __len__(self) -> int:
        return self._stop - self._start

    def subset(self, start: int, stop: int) -> "ShardDataset":
        """A stretch of this stream, as a stream of its own."""
        first = self._start + start
        return ShardDataset(
            self.shards, vocab_size=self._size, start=first, stop=self._start + stop
        )

    def __getitem__(self, where: slice, /) -> Tokens:
        start, stop, step = where.indices(len(self))
        assert step == 1, "a stream is read in its order"
        start, stop = self._start + start, self._start + max(start, stop)
        number = bisect_right(self._begins, start) - 1
        parts: list[Tokens] = []
        while start < stop:
            begin, end = self._begins[number], min(stop, self._begins[number + 1])
            part = self._file(number).read(start - begin, end - begin)
            self._check(part, number)
            parts.append(part)
            start, number = max(start, end), number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _file(self, number: int) -> ShardReader:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= MAX_OPEN_SHARDS:
            # Closed once nobody reads from it any more.
            self._open.popitem(last=False)
        self._open[number] = file = ShardReader(self.shards[number], in_memory=self._in_memory)
        return file

    def _check(self, part: Tokens, number: int) -> None:
        """A GPU answers an id that is not in the table with nothing but a device-side assert."""
        if len(part) and (worst := int(part.max())) >= self._size:
            raise UserError(
                f"{self.shards[number].path.as_posix()}: token id {worst} is outside the "
                f"vocabulary of {self._size}: the shard is damaged, or was made with another "
                "tokenizer; say which with --tokenizer"
            )


HEADER_INTS = 256
"""int32 numbers before the tokens."""
HEADER_BYTES = 4 * HEADER_INTS
SHARD_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
"""Magic and version, and the type of the ids."""
RAW_BIN_HINT = "(nanoGPT's .bin has none: --headerless true)"


def read_shard_header(path: Path) -> ShardFile:
    """Where the tokens of a shard lie. Only the header is read, and the file's size is compared.

    Raises:
        UserError: for a file that is no shard, or not a whole one.
    """
    with parsing(path.as_posix(), "a readable token shard"):
        size = path.stat().st_size
        with files.open_regular(path) as file:
            raw = file.read(HEADER_BYTES)
    name = path.as_posix()
    if len(raw) < HEADER_BYTES:
        raise UserError(
            f"{name}: {size} bytes are too few for a token shard's header {RAW_BIN_HINT}"
        )
    magic, version, count = (int(number) for number in np.frombuffer(raw, "<i4", 3))
    if (magic, version) not in SHARD_DTYPES:
        raise UserError(
            f"{name}: not a token shard: it begins with magic {magic} and version {version}, not "
            f"20240520 and 1, or 20240801 and 7 {RAW_BIN_HINT}"
        )
    dtype = SHARD_DTYPES[magic, version]
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        state = "truncated" if size < expected else "longer than it should be"
        raise UserError(
            f"{name}: {state}: its header counts {count:,} tokens, which take {expected:,} bytes, "
            f"and the file has {size:,}; make or fetch it again"
        )
    return ShardFile(path, dtype, count, HEADER_BYTES)


def read_raw_bin(path: Path) -> ShardFile:
    """nanoGPT's form: uint16 ids and nothing else.

    Raises:
        UserError: for an odd number of bytes, or a file that has a header after all.
    """
    with parsing(path.as_posix(), "a readable token shard"):
        size = path.stat().st_size
        with files.open_regular(path) as file:
            raw = file.read(8)
    if len(raw) == 8 and tuple(np.frombuffer(raw, "<i4")) in SHARD_DTYPES:
        raise UserError(f"{path.as_posix()} has a header: leave --headerless out")
    if size % 2:
        raise UserError(f"{path.as_posix()}: {size:,} bytes are not a whole number of uint16 ids")
    return ShardFile(path, np.dtype("<u2"), size // 2, 0)
