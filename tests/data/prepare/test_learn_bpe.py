"""`--tokenizer bpe` is learned from the training split only, and depends on the text alone."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.readers import FileSpan, read_split
from gptforge.data.prepare.request import PrepareRequest, select_files
from gptforge.data.prepare.scan import scan
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError
from gptforge.estimate.formulas import default_vocab_size
from gptforge.tokenizers.base import char_lengths, decode
from gptforge.tokenizers.hf_bpe import train_bpe
from tests.data.prepare.small_datasets import (
    DOCUMENTS,
    prepare_files,
    some_text,
    texts_of,
    tokens_of,
    write_jsonl,
)

pytest.importorskip("tokenizers")
valid_text = st.text(st.characters(exclude_categories=["Cs"]))
TRAIN_WORD, VAL_WORD = " zyzzyva", " quokka"


def tokens(tokenizer, text: str) -> list[bytes]:
    return [tokenizer.decode_bytes([i]) for i in tokenizer.encode(text)]


def write_form(folder: Path, form: str) -> Path:
    """A text in one file or many, whose training and validation splits repeat one word each."""
    if form == "text":
        path = folder / "t.txt"
        path.write_text(TRAIN_WORD * 900 + VAL_WORD * 90)
    elif form == "names":
        path = folder / "named"
        path.mkdir()
        (path / "train.txt").write_text(TRAIN_WORD * 300)
        (path / "validation.txt").write_text(VAL_WORD * 300)
    elif form == "few":
        path = folder / "few"
        path.mkdir()
        for i in range(10):
            (path / f"{i}.txt").write_text((VAL_WORD if i == 9 else TRAIN_WORD) * (100 + i))
    return path


@pytest.mark.parametrize("form", ["text", "names", "few"])
def test_words_of_the_held_out_part_get_no_merge(tmp_path, form) -> None:
    index = prepare_files(tmp_path / "out", write_form(tmp_path, form), tokenizer="bpe")
    tokenizer = index.load_tokenizer()
    assert tokens(tokenizer, TRAIN_WORD) == [TRAIN_WORD.encode()]
    assert tokens(tokenizer, VAL_WORD) == [bytes([byte]) for byte in VAL_WORD.encode()]
    assert index.total("val", "tokens") > 500


@pytest.mark.parametrize("block", [50, 2**15])
@pytest.mark.parametrize("form", ["text", "jsonl", "folder"])
def test_it_learns_from_the_training_split_of_the_shards(
    tmp_path, monkeypatch, form, block
) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK_BYTES", block)
    if form == "text":
        path = tmp_path / "t.txt"
        path.write_text("".join(DOCUMENTS), encoding="utf-8")
    elif form == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    else:
        path = tmp_path / "folder"
        path.mkdir()
        for number, text in enumerate(DOCUMENTS):
            (path / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    index = prepare_files(tmp_path / "out", path, tokenizer="bpe", val_fraction=0.2)
    # A single text has no end-of-text ids, which `texts_of` splits at.
    train = [decode(index.load_tokenizer(), tokens_of(index, "train"))]
    if form != "text":
        train = texts_of(index, "train")
    expected = train_bpe(train, default_vocab_size(sum(len(text.encode()) for text in train)))
    assert index.load_tokenizer().to_json() == expected.to_json()


def test_same_documents_in_other_files_give_the_same_tokenizer(tmp_path) -> None:
    raw = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw))
    records = [
        prepare_files(
            tmp_path / str(workers), tmp_path / name, tokenizer="bpe", num_workers=workers
        ).record["tokenizer"]
        for name, workers in (("a.jsonl", 1), ("b.jsonl.gz", 2))
    ]
    assert records[0] == records[1]


def test_another_process_learns_the_same(tmp_path) -> None:
    (tmp_path / "t.txt").write_text(" ".join(some_text(i) for i in range(200)), encoding="utf-8")
    code = "import sys; from gptforge.cli import main; sys.exit(main(sys.argv[1:]))"
    hashes = set()
    for seed, threads in (("1", "1"), ("2", "4")):
        out = tmp_path / seed
        args = ("prepare", str(tmp_path / "t.txt"), "--out", str(out), "--tokenizer", "bpe")
        env = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, *args], env=env, check=True)
        hashes.add(hashlib.sha256((out / "tokenizer.json").read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_vocab_size_is_the_number_of_ids(tmp_path) -> None:
    (tmp_path / "t.txt").write_text(" ".join(some_text(i) for i in range(90)), encoding="utf-8")
    sizes = [
        prepare_files(tmp_path / str(size), tmp_path / "t.txt", tokenizer="bpe", vocab_size=size)
        .load_tokenizer()
        .vocab_size
        for size in (257, 270, 290)
    ]
    assert sizes == [257, 270, 290]
    with pytest.raises(UserError, match="--vocab_size must be from 257"):
        prepare_files(tmp_path / "x", tmp_path / "t.txt", tokenizer="bpe", vocab_size=100)


def test_default_vocab_size_grows_with_the_text() -> None:
    sizes = [default_vocab_size(10**exponent) for exponent in range(3, 12)]
    assert sizes == sorted(sizes)
    assert all(size % 64 == 0 for size in sizes)
    assert (sizes[0], default_vocab_size(10**7), sizes[-1]) == (320, 4096, 32768)


@settings(max_examples=40)
@given(
    learned_from=st.lists(valid_text, max_size=5),
    text=valid_text,
    vocab_size=st.integers(257, 400),
)
def test_any_text_round_trips(learned_from, text, vocab_size) -> None:
    tokenizer = train_bpe(learned_from, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    assert decode(tokenizer, tokenizer.encode(text)) == text
    assert char_lengths(tokenizer)[tokenizer.encode(text)].sum() == len(text)


@settings(max_examples=60)
@given(
    words=st.lists(st.sampled_from(["a", " ", "\n", "bc", "  d", "é", "日本", "\r\n", "!"])),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    block=st.integers(4, 40),
)
def test_parts_are_the_training_text(tmp_path_factory, words, fraction, block) -> None:
    text = "".join(words).replace("\r\n", "\n")
    if not text.strip() or (fraction and int(len(text) * (1 - fraction)) in (0, len(text))):
        return
    path = tmp_path_factory.mktemp("parts") / "t.txt"
    path.write_bytes("".join(words).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptforge.data.prepare.text_io.BLOCK_BYTES", block)
        request = PrepareRequest((str(path),), val_fraction=fraction)
        selection = select_files(request)
        rule, (source,) = scan(request, selection).split_rule, selection.sources
        found = list(read_split(FileSpan(0, source), rule, TextFormat(), BadInputHandler(False)))
    parts = [part.text for part in found if part.split == "train"]
    assert "".join(part.text for part in found) == text
    assert "".join(parts) == text[: int(len(text) * (1 - fraction)) if fraction else len(text)]
    # Words are whole: a part ends where the next begins with its space.
    assert all(part[0] in " \n" and not part[1:2].isspace() for part in parts[1:])


def test_cache_is_shared_by_the_name_and_the_tokenizer_itself(tmp_path, monkeypatch) -> None:
    path = tmp_path / "t.txt"
    path.write_text(" ".join(some_text(i) for i in range(90)), encoding="utf-8")
    first = open_dataset(path, DatasetOptions(tokenizer="bpe"))

    def fail(*args: object) -> None:
        raise AssertionError("learned or prepared again")

    monkeypatch.setattr("gptforge.data.cache.learn_bpe", fail)
    monkeypatch.setattr("gptforge.data.prepare.pipeline.run_jobs", fail)
    again = open_dataset(path, DatasetOptions(tokenizer="bpe"))
    by_tokenizer = open_dataset(path, DatasetOptions(tokenizer=first.tokenizer))
    assert again.train.shards == first.train.shards == by_tokenizer.train.shards
    assert (again.tokenizer_name, by_tokenizer.tokenizer_name) == ("bpe", "bpe")


def test_another_rule_for_the_size_learns_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "t.txt"
    path.write_text(" ".join(some_text(i) for i in range(90)), encoding="utf-8")
    first = open_dataset(path, DatasetOptions(tokenizer="bpe"))
    for module in ("estimate.formulas", "data.cache"):
        monkeypatch.setattr(f"gptforge.{module}.LEARNED_VOCAB_SIZES", ((1, 384), (2, 384)))
    again = open_dataset(path, DatasetOptions(tokenizer="bpe"))
    assert (first.tokenizer.vocab_size, again.tokenizer.vocab_size) == (320, 384)


def swap_merges(path: Path) -> None:
    record = json.loads(path.read_text("utf-8"))
    record["merges"][:2] = record["merges"][1::-1]
    path.write_text(json.dumps(record) + "\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("damage", [swap_merges, truncate])
def test_damaged_tokenizer_in_the_cache_is_learned_again(
    tmp_path, monkeypatch, caplog, damage
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "t.txt"
    path.write_text(" ".join(some_text(i) for i in range(90)), encoding="utf-8")
    first = open_dataset(path, DatasetOptions(tokenizer="bpe"))
    [cached] = (tmp_path / "cache").rglob("bpe-*.json")
    content = cached.read_bytes()
    damage(cached)
    again = open_dataset(path, DatasetOptions(tokenizer="bpe"))
    assert f"{cached.as_posix()} was damaged" in caplog.text
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert again.train.shards == first.train.shards
    assert [p.read_bytes() for p in (tmp_path / "cache").rglob("bpe-*.json")] == [content]


def test_bad_input_is_one_line_with_the_hint_of_other_tokenizers(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "words " * 9}) + "\n{broken\n")
    messages = []
    for tokenizer in ("gpt2", "bpe"):
        with pytest.raises(UserError) as caught:
            open_dataset(path, DatasetOptions(tokenizer=tokenizer))
        messages.append(str(caught.value))
    assert messages[0] == messages[1].replace(" --tokenizer bpe`", "`")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(UserError, match=r"not utf-8: .*give its encoding"):
        open_dataset(tmp_path / "b.txt", DatasetOptions(tokenizer="bpe"))


def test_shards_of_another_tokenizer_refuse_it(tmp_path) -> None:
    (tmp_path / "t.txt").write_text(some_text(1), encoding="utf-8")
    prepare_files(tmp_path / "out", tmp_path / "t.txt", tokenizer="byte")
    options = DatasetOptions(tokenizer="bpe", require_tokenizer=True)
    with pytest.raises(
        UserError, match=r"prepared with the tokenizer byte .*leave --tokenizer out"
    ):
        open_dataset(tmp_path / "out", options)
    (tmp_path / "x.bin").write_bytes(bytes(64))
    raw = DatasetOptions(tokenizer="bpe", require_tokenizer=True, raw_bin=True)
    with pytest.raises(UserError, match=r"give --tokenizer a tokenizer.json"):
        open_dataset(tmp_path / "x.bin", raw)
