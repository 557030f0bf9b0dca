"""The estimated size of a text agrees with what is prepared of it."""

import gzip
from pathlib import Path

import pytest

from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.prepare.request import TextOptions, estimate_text_size
from gptforge.errors import UserError
from tests.data.prepare.small_datasets import prepare_files, some_text, write_jsonl

TEXT = " ".join(some_text(i) for i in range(300))


def test_plain_text_and_shards_are_exact(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT, encoding="utf-8")
    index = prepare_files(tmp_path / "out", path, tokenizer="byte", val_fraction=0.25)
    estimated = estimate_text_size(path, TextOptions(val_fraction=0.25))
    assert estimated.num_bytes == pytest.approx(index.total("train", "bytes"), rel=0.01)
    assert estimated.tokenizer_name == ""
    prepared = estimate_text_size(tmp_path / "out", TextOptions(val_fraction=0.1))
    assert prepared.num_bytes == index.total("train", "bytes")
    assert prepared.tokenizer_name == "byte"


@pytest.mark.parametrize("form", ["folder", "named", "jsonl", "gz"])
def test_other_forms_are_estimated(tmp_path, form) -> None:
    path = tmp_path / "data"
    if form in ("folder", "named"):
        path.mkdir()
        for i in range(20):
            name = f"{i}.txt" if form == "folder" else f"{'val' if i > 15 else 'train'}-{i}.txt"
            (path / name).write_text(some_text(i, words=300), encoding="utf-8")
    elif form == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", [some_text(i, words=300) for i in range(120)])
    else:
        path = tmp_path / "t.txt.gz"
        path.write_bytes(gzip.compress(TEXT.encode()))
    dataset = open_dataset(path, DatasetOptions(tokenizer="byte", val_fraction=0.1))
    estimated = estimate_text_size(path, TextOptions(val_fraction=0.1)).num_bytes
    assert len(dataset.train) / 4 < estimated < len(dataset.train) * 2


def test_shards_of_other_programs_and_missing_files(tmp_path) -> None:
    (tmp_path / "train.bin").write_bytes(bytes(3000))
    (tmp_path / "val.bin").write_bytes(bytes(500))
    (tmp_path / ".more_train.partial.bin").write_bytes(bytes(900))  # being downloaded
    size = estimate_text_size(tmp_path, TextOptions(val_fraction=0.1))
    assert (size.num_bytes, size.tokenizer_name) == (6000, "gpt2")
    (tmp_path / "test.bin").write_bytes(bytes(700))
    (tmp_path / "medieval.bin").write_bytes(bytes(100))
    assert estimate_text_size(tmp_path, TextOptions(val_fraction=0.1)).num_bytes == 6200
    (tmp_path / "val.bin").unlink()
    assert estimate_text_size(tmp_path, TextOptions(val_fraction=0.1)).num_bytes == 5580
    with pytest.raises(UserError, match="no such file"):
        estimate_text_size(Path("nothing.txt"), TextOptions(val_fraction=0.1))
