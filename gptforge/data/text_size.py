"""How much text an input holds, before it is read: from the sizes of its files."""

from dataclasses import dataclass
from pathlib import Path

from gptforge.data.prepare.request import TextOptions, select_files
from gptforge.data.prepare.sources import Source
from gptforge.data.shard_index import read_index

SHARD_SUFFIX = ".bin"
COMPRESSION_RATIO = 3
"""Bytes of text per byte of a compressed file, about; of Parquet, too, which compresses columns."""
TEXT_PER_SHARD_BYTE = 2
"""Shards of other programs: 4 bytes of text per token of GPT-2, which takes 2 bytes."""


@dataclass(frozen=True)
class TextSize:
    """Bytes of text to train on, and the tokenizer of shards, which is fixed; else empty."""

    num_bytes: int
    tokenizer_name: str = ""


def estimate_text_size(path: Path, options: TextOptions) -> TextSize:
    """Estimate the bytes of text to train on; exact for plain text and prepared shards.

    A UserError if there are no files, or it is a pipe, which can only be read once.
    """
    if path.is_dir() and (index := read_index(path)) is not None:
        name = str(index.record["tokenizer"]["name"])
        return TextSize(index.total("train", "bytes"), name)
    shards = [path] if path.suffix == SHARD_SUFFIX else []
    if path.is_dir():
        shards = [shard for shard in path.glob(f"*{SHARD_SUFFIX}") if "val" not in shard.name]
    if shards:
        num_bytes = sum(shard.stat().st_size for shard in shards if shard.is_file())
        return TextSize(TEXT_PER_SHARD_BYTE * num_bytes, "gpt2")
    selection = select_files(options.request(path))
    train = [s for i, s in enumerate(selection.sources) if i not in set(selection.val_sources)]
    share = 1.0 if selection.val_sources else 1 - options.val_fraction
    return TextSize(round(sum(map(_text_bytes, train)) * share))


def _text_bytes(source: Source) -> int:
    is_compressed = source.compression or source.kind == "parquet"
    return source.size * (COMPRESSION_RATIO if is_compressed else 1)
