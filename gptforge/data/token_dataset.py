"""Token shards in the format of llm.c, modded-nanogpt and the ready-made FineWeb shards.

A header of 256 int32 (magic, version, number of tokens, zeros), then the ids: uint16 with magic
20240520 and version 1, uint32 with magic 20240801 and version 7. All little-endian.
See github.com/karpathy/llm.c, dev/data.
"""

import contextlib
import functools
import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptforge import files
from gptforge.errors import UserError, explain_os_error, parsing
from gptforge.tokenizers.base import Tokens

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
SHARD_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
"""The type of the ids, by magic and version."""
RAW_BIN_HINT = (
    "(nanoGPT's .bin has none: --raw_bin true; to read texts in its folder, name them: DIR/*.txt)"
)
EDGE_TOKENS = 2**18
BLOCK_TOKENS = 2**20  # tokens read at a time, when all are
MAX_OPEN_SHARDS = 256  # file handles; systems give a process about a thousand
MAX_IN_MEMORY_BYTES = 2**26  # datasets up to this size are read into memory


class TokenDataset(Protocol):
    """A sequence of token ids, sliced without a step; a numpy array is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> Tokens: ...


def edges(tokens: TokenDataset) -> list[Tokens]:
    """The first and the last EDGE_TOKENS."""
    return [tokens[:EDGE_TOKENS], tokens[max(0, len(tokens) - EDGE_TOKENS) : len(tokens)]]


def find_documents(
    tokens: TokenDataset, eot_token: int | None, *, track: Callable[[range], Iterable[int]] = iter
) -> Iterator[tuple[int, int, int]]:
    """The documents that are not empty, however long; all but perhaps the first begin with an eot.

    Args:
        tokens: read once, in blocks.
        eot_token: the id before each document; None: all tokens are one document.
        track: shows the progress of an iteration over the blocks.

    Yields:
        The positions of a document's first token and after its last one, and 64 bits of a hash of
        its tokens without the `eot_token`.
    """
    digest, start, length = hashlib.sha256(), 0, 0
    for begin in track(range(0, len(tokens), BLOCK_TOKENS)):
        block = tokens[begin : begin + BLOCK_TOKENS].astype("<u4")
        bounds = np.flatnonzero(block == eot_token).tolist() if eot_token is not None else []
        for number, part in enumerate(np.split(block, bounds)):
            if number:
                stop = begin + bounds[number - 1]
                if length:
                    yield start, stop, int.from_bytes(digest.digest()[:8], "big")
                digest, start, length, part = hashlib.sha256(), stop, 0, part[1:]
            digest.update(part.tobytes())
            length += len(part)
    if length:
        yield start, len(tokens), int.from_bytes(digest.digest()[:8], "big")


@dataclass(frozen=True)
class ShardFile:
    """Where the tokens of a shard are: `num_tokens` ids of `dtype`, `offset` bytes into a file."""

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int
    offset: int


def cut_shards(
    shards: Sequence[ShardFile], position: int
) -> tuple[list[ShardFile], list[ShardFile]]:
    """Split shards before the token at `position` of their concatenation, which may cut one."""
    before, after = [], []
    for shard in shards:
        num_tokens = min(max(0, position), shard.num_tokens)
        offset = shard.offset + num_tokens * shard.dtype.itemsize
        before.append(replace(shard, num_tokens=num_tokens))
        after.append(replace(shard, num_tokens=shard.num_tokens - num_tokens, offset=offset))
        position -= shard.num_tokens
    return before, after


def read_shard_header(path: Path) -> ShardFile:
    """Read the header of a shard; a UserError unless its size is the one that it says."""
    name, (size, raw) = path.as_posix(), _size_and_head(path, HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{name}: {size} bytes: too few for a token shard's header {RAW_BIN_HINT}")
    magic, version, count = (int(number) for number in np.frombuffer(raw, "<i4", 3))
    if (magic, version) not in SHARD_DTYPES:
        known = f"20240520 and 1, or 20240801 and 7 {RAW_BIN_HINT}"
        found = f"it begins with magic {magic} and version {version}, not {known}"
        raise UserError(f"{name}: not a token shard: {found}")
    dtype = SHARD_DTYPES[magic, version]
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        state = "truncated" if size < expected else "too long"
        sizes = f"{count:,} tokens, which take {expected:,} bytes, and the file has {size:,}"
        raise UserError(f"{name}: {state}: its header counts {sizes}; create or download it again")
    return ShardFile(path, dtype, count, HEADER_BYTES)


def read_raw_bin(path: Path) -> ShardFile:
    """nanoGPT's format: uint16 ids without a header."""
    name, (size, raw) = path.as_posix(), _size_and_head(path, 8)
    if len(raw) == 8 and tuple(np.frombuffer(raw, "<i4")) in SHARD_DTYPES:
        raise UserError(f"{name} has a header: leave --raw_bin out")
    if size % 2:
        raise UserError(f"{name}: {size:,} bytes are not a whole number of uint16 ids")
    return ShardFile(path, np.dtype("<u2"), size // 2, 0)


def _size_and_head(path: Path, length: int) -> tuple[int, bytes]:
    with parsing(path.as_posix(), "a readable token shard"):
        size = path.stat().st_size
        with files.open_regular(path) as file:
            return size, file.read(length)


class ShardWriter:
    """Writes one shard to a temporary file and renames it when it is complete."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.num_tokens = path, 0
        self._magic = next(magic for magic, ids in SHARD_DTYPES.items() if ids == dtype)
        self._dtype = dtype.newbyteorder("<")
        with files.add_filename_to_errors(path):
            self._partial = files.create_partial(path)
            self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: Tokens) -> None:
        """Append ids."""
        with files.add_filename_to_errors(self.path):
            self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)

    def close(self) -> str:
        """Write the header, sync and rename; returns the SHA-256 of the file."""
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = (*self._magic, self.num_tokens)
        with files.add_filename_to_errors(self.path):
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.close()
            sha256 = files.sha256(self._partial)
            files.commit_partial(self._partial, self.path)
        return sha256

    def abort(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(OSError):
            # Closing flushes the buffer, which fails again on a full disk.
            self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardReader:
    """An open shard, readable at any offset by several threads at once.

    It is not memory-mapped: truncating a mapped file kills the process with SIGBUS. Reading costs
    about a microsecond more per sequence than copying from a mapping. With `in_memory` all of it is
    read now. A file that is missing or too short is a UserError.
    """

    def __init__(self, shard: ShardFile, *, in_memory: bool = False) -> None:
        self._shard = shard
        self._tokens: Tokens | None = None
        self._lock = threading.Lock()
        try:
            self._file = files.open_regular(shard.path, buffering=0)
        except OSError as error:
            raise self._unreadable(*explain_os_error(error)) from None
        size = os.fstat(self._file.fileno()).st_size
        if size < shard.offset + shard.num_tokens * shard.dtype.itemsize:
            raise self._unreadable("it is truncated")
        if in_memory:
            self._tokens = self.read(0, shard.num_tokens)
            self._file.close()

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of the shard."""
        if self._tokens is not None:
            return self._tokens[start:stop]
        itemsize = self._shard.dtype.itemsize
        length, offset = itemsize * (stop - start), self._shard.offset + itemsize * start
        data = b""
        try:
            with self._lock:
                self._file.seek(offset)
                # Unbuffered: one read may return less than there is, on some file systems.
                while len(data) < length and (more := self._file.read(length - len(data))):
                    data += more
        except OSError as error:
            raise self._unreadable(*explain_os_error(error)) from None
        if len(data) < length:
            raise self._unreadable("it was truncated while in use")
        tokens: Tokens = np.frombuffer(data, self._shard.dtype)
        return tokens

    def _unreadable(self, reason: str, fix: str = "") -> UserError:
        name = self._shard.path.as_posix()
        return UserError(
            f"{name}: no longer readable: {reason}; {fix or 'create or download it again'}"
        )


class ShardDataset:
    """The concatenated tokens of many shards, read from disk on demand; slices may span shards.

    Args:
        shards: in the order of the tokens.
        vocab_size: a larger id in a shard is a UserError when it is read.
    """

    def __init__(self, shards: Sequence[ShardFile], *, vocab_size: int) -> None:
        self.shards = tuple(shard for shard in shards if shard.num_tokens)
        self._vocab_size = vocab_size
        self._shard_starts = [0, *accumulate(shard.num_tokens for shard in self.shards)]
        num_bytes = sum(shard.num_tokens * shard.dtype.itemsize for shard in self.shards)
        open_shard = functools.partial(ShardReader, in_memory=num_bytes <= MAX_IN_MEMORY_BYTES)
        # A file closes when it is dropped here and no other thread reads from it any more.
        self._reader = functools.lru_cache(MAX_OPEN_SHARDS)(open_shard)

    def __len__(self) -> int:
        return self._shard_starts[-1]

    def __getitem__(self, where: slice, /) -> Tokens:
        start, stop, step = where.indices(len(self))
        assert step == 1, "tokens are read in order"
        i = bisect_right(self._shard_starts, start) - 1
        parts: list[Tokens] = []
        while start < stop:
            shard_start, end = self._shard_starts[i], min(stop, self._shard_starts[i + 1])
            reader = self._reader(self.shards[i])
            parts.append(reader.read(start - shard_start, end - shard_start))
            self._check_ids(parts[-1], self.shards[i])
            start, i = end, i + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def _check_ids(self, part: Tokens, shard: ShardFile) -> None:
        # On a GPU, an id beyond the embedding is just a device-side assert.
        if len(part) and (largest := int(part.max())) >= self._vocab_size:
            raise UserError(
                f"{shard.path.as_posix()}: token id {largest} is outside the vocabulary of "
                f"{self._vocab_size}: the shard is damaged, or was made with another tokenizer; "
                "name that one with --tokenizer"
            )
