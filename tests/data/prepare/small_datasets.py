"""Small data sets to prepare, and what was prepared."""

import json
import random
from pathlib import Path

import pytest

from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import VERIFIED_FILE, Index
from gptforge.data.token_dataset import ShardDataset
from gptforge.tokenizers.base import decode

EOT = "<|endoftext|>"
WORDS = ["light", "yonder", "window", "café", "日本", "it's", "1,024", "breaks", "  ", "\n", "soft"]


def some_text(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words)).strip() + f"\nend {seed}"


DOCUMENTS = [some_text(i) for i in range(120)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list[str], *, rows: int = 7) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows)
    return path


def prepare_files(out_dir: Path, *names: object, **options) -> Index:
    settings = {name: options.pop(name) for name in ("num_workers", "restart") if name in options}
    text_format = TextFormat(
        **{name: options.pop(name) for name in ("field", "split_on") if name in options}
    )
    request = PrepareRequest(tuple(map(str, names)), text_format=text_format, **options)
    return prepare(out_dir, request, **settings)


def tokens_of(index: Index, split: str) -> list[int]:
    return ShardDataset(index.shards(split), vocab_size=10**6)[:].tolist()


def texts_of(index: Index, split: str) -> list[str]:
    text = decode(index.load_tokenizer(), tokens_of(index, split))
    assert not text or text.startswith(EOT)
    return text.split(EOT)[1:]


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but the record of verified ones, which contains modification times."""
    paths = sorted(path for path in folder.iterdir() if path.name != VERIFIED_FILE)
    return {path.name: path.read_bytes() for path in paths}
