"""Encode the documents of one split of a job and write them as token shards."""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.prepare.split import SplitName
from gptforge.data.token_dataset import HEADER_BYTES, HEADER_INTS, SHARD_DTYPES
from gptforge.errors import UserError
from gptforge.tokenizers.base import Tokenizer, Tokens, smallest_dtype
from gptforge.tokenizers.fast_encode import FastEncoder

MAX_SHARD_TOKENS = 2**27
SELF_CHECK_CHARS = 2**16  # characters to compare with the reference tokenizer first


class ShardWriter:
    """Writes one shard to a temporary file and renames it when it is complete."""

    def __init__(self, path: Path, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> None:
        self.path, self.num_tokens = path, 0
        self._magic = next(magic for magic, ids in SHARD_DTYPES.items() if ids == dtype)
        self._dtype = dtype.newbyteorder("<")
        self._replace = files.atomic_replace(path)
        self._partial = self._replace.__enter__()
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
        self._replace.__exit__(None, None, None)
        return sha256

    def abort(self) -> None:
        """Delete the temporary file."""
        with contextlib.suppress(OSError):
            # Closing flushes the buffer, which fails again on a full disk.
            self._file.close()
        self._partial.unlink(missing_ok=True)


class SplitWriter:
    """Encodes the documents of one split of a job and writes them as shards."""

    def __init__(
        self,
        out_dir: Path,
        split: SplitName,
        job_index: int,
        tokenizer: Tokenizer,
        encoder: FastEncoder,
        prepend_eot: bool,
    ) -> None:
        self._name, self._split = (out_dir / f"{split}_{job_index:06d}").as_posix(), split
        self._encoder, self._is_checked = encoder, False
        self._dtype: Any = np.dtype(smallest_dtype(tokenizer.vocab_size))
        self._prefix = np.array([tokenizer.eot_token] if prepend_eot else [], self._dtype)
        self._shard: ShardWriter | None = None
        self._counts = Counter[str]()
        self.shards: list[dict[str, Any]] = []  # records of the complete ones, for the index

    def add(self, text: str, source_name: str, *, starts_document: bool = True) -> None:
        """Encode and write a document, or a part of one.

        Raises:
            UserError: for a character that the tokenizer lacks, with the name of the file.
        """
        if not self._is_checked:
            self._encoder.matches_reference(text[:SELF_CHECK_CHARS])
            self._is_checked = True
        try:
            ids = self._encoder.encode(text)
        except UserError as error:
            raise UserError(f"{source_name}: {error}") from None
        if starts_document:
            ids = np.concatenate([self._prefix, ids])
        if self._shard is None:
            suffix = f"_{len(self.shards)}" if self.shards else ""
            self._shard = ShardWriter(Path(f"{self._name}{suffix}.bin"), self._dtype)
        self._shard.write(ids)
        self._counts.update(
            documents=int(starts_document),
            characters=len(text),
            bytes=len(text) if text.isascii() else len(text.encode("utf-8")),
            tokens=len(ids),
        )
        if self._counts["tokens"] >= MAX_SHARD_TOKENS:
            self.close()

    def abort(self) -> None:
        """Delete the open shard."""
        if self._shard is not None:
            self._shard.abort()

    def close(self) -> None:
        """Complete the open shard."""
        if self._shard is None:
            return
        name, sha256 = self._shard.path.name, self._shard.close()
        self.shards.append({"file": name, "split": self._split, "sha256": sha256, **self._counts})
        self._shard, self._counts = None, Counter[str]()
