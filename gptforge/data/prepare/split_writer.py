"""One side of a job, train or val: its shards, and what went into them."""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.prepare.split import SplitName
from gptforge.data.token_dataset import HEADER_BYTES, HEADER_INTS, SHARD_DTYPES
from gptforge.tokenizers.base import Tokens


@dataclass(frozen=True)
class WrittenShard:
    """A shard that is whole on the disk."""

    file: str
    tokens: int
    sha256: str


class ShardWriter:
    """Writes one shard beside its place, and puts it there when it is whole."""

    def __init__(self, path: Path, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> None:
        self.path = path
        self.num_tokens = 0
        self._form = next(form for form, kind in SHARD_DTYPES.items() if kind == dtype)
        self._dtype = dtype.newbyteorder("<")
        self._place: AbstractContextManager[Path] = files.atomic_replace(path)
        self._partial = self._place.__enter__()
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: Tokens) -> None:
        """Add ids behind those that are there."""
        with files.add_filename_to_errors(self.path):
            self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.num_tokens += len(tokens)

    def close(self) -> WrittenShard:
        """Write the header, sync, rename."""
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = (*self._form, self.num_tokens)
        with files.add_filename_to_errors(self.path):
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.close()
        digest = files.sha256(self._partial)
        self._place.__exit__(None, None, None)
        return WrittenShard(self.path.name, self.num_tokens, digest)

    def abort(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            # What a full disk refused is tried once more here, in vain.
            self._file.close()
        self._partial.unlink(missing_ok=True)


MAX_SHARD_TOKENS = 2**27
"""Tokens behind which a new shard is begun."""


@dataclass
class SplitCounts:
    """What went to one side."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


class SplitWriter:
    """The shards of one side of a job, opened when there is something to write."""

    def __init__(self, folder: Path, side: SplitName, job: int, dtype: Any) -> None:
        self._folder, self._side, self._job, self._dtype = folder, side, job, dtype
        self._writer: ShardWriter | None = None
        self._count = SplitCounts()
        self.shards: list[dict[str, Any]] = []

    def write(self, ids: Any, *, num_documents: int, num_chars: int, num_bytes: int) -> None:
        """Add ids, and count what they stand for."""
        if self._writer is None:
            more = f"_{len(self.shards)}" if self.shards else ""
            name = f"{self._side}_{self._job:06d}{more}.bin"
            self._writer = ShardWriter(self._folder / name, np.dtype(self._dtype))
        self._writer.write(ids)
        count = self._count
        count.documents += num_documents
        count.characters += num_chars
        count.bytes += num_bytes
        count.tokens += len(ids)
        if count.tokens >= MAX_SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Put the shard in its place, if one was begun."""
        if self._writer is None:
            return
        written, self._writer = self._writer.close(), None
        record = {"file": written.file, "split": self._side, "sha256": written.sha256}
        self.shards.append({**record, **asdict(self._count)})
        self._count = SplitCounts()

    def abort(self) -> None:
        """Leave nothing behind of the one that was begun."""
        if self._writer is not None:
            self._writer.abort()


BATCH_CHARS = 2**20
"""Characters that are encoded at a time."""
