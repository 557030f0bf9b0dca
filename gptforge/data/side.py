"""One side of a job, train or val: its shards, and what went into them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge.data.shards import ShardWriter
from gptforge.data.split import Side

MOST_SHARD = 2**27
"""Tokens behind which a new shard is begun."""


@dataclass
class SideCount:
    """What went to one side."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


class SideShards:
    """The shards of one side of a job, opened when there is something to write."""

    def __init__(self, folder: Path, side: Side, job: int, dtype: Any) -> None:
        self._folder, self._side, self._job, self._dtype = folder, side, job, dtype
        self._writer: ShardWriter | None = None
        self._count = SideCount()
        self.made: list[dict[str, Any]] = []

    def write(self, ids: Any, *, documents: int, characters: int, n_bytes: int) -> None:
        """Add ids, and count what they stand for."""
        if self._writer is None:
            more = f"_{len(self.made)}" if self.made else ""
            name = f"{self._side}_{self._job:06d}{more}.bin"
            self._writer = ShardWriter(self._folder / name, np.dtype(self._dtype))
        self._writer.write(ids)
        count = self._count
        count.documents += documents
        count.characters += characters
        count.bytes += n_bytes
        count.tokens += len(ids)
        if count.tokens >= MOST_SHARD:
            self.close()

    def close(self) -> None:
        """Put the shard in its place, if one was begun."""
        if self._writer is None:
            return
        written, self._writer = self._writer.close(), None
        record = {"file": written.file, "split": self._side, "sha256": written.sha256}
        self.made.append({**record, **asdict(self._count)})
        self._count = SideCount()

    def abandon(self) -> None:
        """Leave nothing behind of the one that was begun."""
        if self._writer is not None:
            self._writer.abandon()
