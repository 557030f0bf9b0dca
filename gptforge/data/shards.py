"""Token shards in the form that llm.c, modded-nanogpt and the ready-made FineWeb shards share.

A header of 256 int32 (magic, version, number of tokens, zeros), then the ids: uint16 with magic
20240520 and version 1, uint32 with magic 20240801 and version 7. All little-endian.
See github.com/karpathy/llm.c, dev/data.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.stream import ShardFile
from gptforge.errors import UserError, parsing
from gptforge.tokenizers.base import Tokens

HEADER = 256
"""int32 numbers before the tokens."""
HEADER_BYTES = 4 * HEADER
FORMS: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}
"""Magic and version, and the type of the ids."""
NO_HEADER = "(nanoGPT's .bin has none: --headerless true)"


def read_header(path: Path) -> ShardFile:
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
        raise UserError(f"{name}: {size} bytes are too few for a token shard's header {NO_HEADER}")
    magic, version, count = (int(number) for number in np.frombuffer(raw, "<i4", 3))
    if (magic, version) not in FORMS:
        raise UserError(
            f"{name}: not a token shard: it begins with magic {magic} and version {version}, not "
            f"20240520 and 1, or 20240801 and 7 {NO_HEADER}"
        )
    dtype = FORMS[magic, version]
    expected = HEADER_BYTES + count * dtype.itemsize
    if count < 0 or size != expected:
        state = "truncated" if size < expected else "longer than it should be"
        raise UserError(
            f"{name}: {state}: its header counts {count:,} tokens, which take {expected:,} bytes, "
            f"and the file has {size:,}; make or fetch it again"
        )
    return ShardFile(path, dtype, count, HEADER_BYTES)


def read_headerless(path: Path) -> ShardFile:
    """nanoGPT's form: uint16 ids and nothing else.

    Raises:
        UserError: for an odd number of bytes, or a file that has a header after all.
    """
    with parsing(path.as_posix(), "a readable token shard"):
        size = path.stat().st_size
        with files.open_regular(path) as file:
            raw = file.read(8)
    if len(raw) == 8 and tuple(np.frombuffer(raw, "<i4")) in FORMS:
        raise UserError(f"{path.as_posix()} has a header: leave --headerless out")
    if size % 2:
        raise UserError(f"{path.as_posix()}: {size:,} bytes are not a whole number of uint16 ids")
    return ShardFile(path, np.dtype("<u2"), size // 2, 0)


@dataclass(frozen=True)
class Written:
    """A shard that is whole on the disk."""

    file: str
    tokens: int
    sha256: str


class ShardWriter:
    """Writes one shard beside its place, and puts it there when it is whole."""

    def __init__(self, path: Path, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> None:
        self.path = path
        self.tokens = 0
        self._form = next(form for form, kind in FORMS.items() if kind == dtype)
        self._dtype = dtype.newbyteorder("<")
        self._place: AbstractContextManager[Path] = files.replacing(path)
        self._partial = self._place.__enter__()
        self._file = self._partial.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: Tokens) -> None:
        """Add ids behind those that are there."""
        with files.naming(self.path):
            self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.tokens += len(tokens)

    def close(self) -> Written:
        """Write the header, sync, rename."""
        header = np.zeros(HEADER, "<i4")
        header[:3] = (*self._form, self.tokens)
        with files.naming(self.path):
            self._file.seek(0)
            self._file.write(header.tobytes())
            self._file.close()
        digest = files.sha256(self._partial)
        self._place.__exit__(None, None, None)
        return Written(self.path.name, self.tokens, digest)

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):
            # What a full disk refused is tried once more here, in vain.
            self._file.close()
        self._partial.unlink(missing_ok=True)
