"""Encode the documents of one split of a job and write them as token shards."""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.prepare.split import SplitName
from gptforge.data.token_dataset import HEADER_BYTES, HEADER_INTS, SHARD_DTYPES
from gptforge.errors import UserError
from gptforge.tokenizers.base import Tokenizer, Tokens, smallest_dtype
from gptforge.tokenizers.fast_encode import FastEncoder

BATCH_CHARS = 2**20  # characters encoded per call
MAX_SHARD_TOKENS = 2**27
SELF_CHECK_CHARS = 2**16  # characters to compare with the reference tokenizer first


class ShardWriter:
    """Writes one shard to a temporary file and renames it when it is complete."""

    def __init__(self, path: Path, dtype: np.dtype[np.uint16] | np.dtype[np.uint32]) -> None:
        self.path = path
        self.num_tokens = 0
        self._magic = next(magic for magic, ids in SHARD_DTYPES.items() if ids == dtype)
        self._dtype = dtype.newbyteorder("<")
        self._replace: AbstractContextManager[Path] = files.atomic_replace(path)
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


@dataclass
class SplitCounts:
    """Totals of a shard; the names are keys of the index."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0


class SplitWriter:
    """Batches the documents of one split of a job, encodes them and writes shards."""

    def __init__(
        self,
        out_dir: Path,
        split: SplitName,
        job_index: int,
        tokenizer: Tokenizer,
        encoder: FastEncoder,
        prepend_eot: bool,
    ) -> None:
        self._out_dir, self._split, self._job_index = out_dir, split, job_index
        self._tokenizer, self._encoder = tokenizer, encoder
        self._dtype: Any = np.dtype(smallest_dtype(tokenizer.vocab_size))
        self._prepend_eot = prepend_eot
        self._is_checked = False
        self._pending: list[tuple[str, str]] = []  # text and name of its file
        self._pending_chars = 0
        self._shard: ShardWriter | None = None
        self._counts = SplitCounts()
        self.shards: list[dict[str, Any]] = []  # records of the complete ones, for the index

    def add_document(self, text: str, source_name: str) -> None:
        """Add a document; it is encoded and written with others, about `BATCH_CHARS` at a time.

        Raises:
            UserError: for a character that the tokenizer lacks, with the name of the file.
        """
        self._pending.append((text, source_name))
        self._pending_chars += len(text)
        if self._pending_chars >= BATCH_CHARS:
            self.flush()

    def add_part(self, text: str, source_name: str, *, starts_document: bool) -> None:
        """Encode and write a part of a long document immediately."""
        self.flush()
        ids = self._encode(text, source_name)
        if starts_document and self._prepend_eot:
            self._write(np.array([self._tokenizer.eot_token], self._dtype), [], num_documents=0)
        self._write(ids, [text], num_documents=int(starts_document))

    def flush(self) -> None:
        """Encode and write the pending documents."""
        pending, self._pending, self._pending_chars = self._pending, [], 0
        if not pending:
            return
        texts = [text for text, _ in pending]
        if self._prepend_eot:
            self._check_encoder(texts[0])
            try:
                ids = self._encoder.encode_documents(texts)
            except UserError:
                for text, source_name in pending:
                    self._encode(text, source_name)  # raises for the file at fault
                raise
        else:
            ids = np.concatenate([self._encode(text, name) for text, name in pending])
        self._write(ids, texts, num_documents=len(texts))

    def close(self) -> None:
        """Write what is pending and complete the open shard."""
        self.flush()
        self._close_shard()

    def abort(self) -> None:
        """Delete the open shard."""
        if self._shard is not None:
            self._shard.abort()

    def _encode(self, text: str, source_name: str) -> Tokens:
        self._check_encoder(text)
        try:
            return self._encoder.encode(text)
        except UserError as error:
            raise UserError(f"{source_name}: {error}") from None

    def _check_encoder(self, text: str) -> None:
        if not self._is_checked:
            self._encoder.matches_reference(text[:SELF_CHECK_CHARS])
            self._is_checked = True

    def _write(self, ids: Tokens, texts: list[str], *, num_documents: int) -> None:
        if self._shard is None:
            suffix = f"_{len(self.shards)}" if self.shards else ""
            name = f"{self._split}_{self._job_index:06d}{suffix}.bin"
            self._shard = ShardWriter(self._out_dir / name, self._dtype)
        self._shard.write(ids)
        counts = self._counts
        counts.documents += num_documents
        counts.characters += sum(map(len, texts))
        counts.bytes += sum(len(t) if t.isascii() else len(t.encode("utf-8")) for t in texts)
        counts.tokens += len(ids)
        if counts.tokens >= MAX_SHARD_TOKENS:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        record = {
            "file": self._shard.path.name,
            "split": self._split,
            "sha256": self._shard.close(),
        }
        self.shards.append(record | asdict(self._counts))
        self._shard, self._counts = None, SplitCounts()
