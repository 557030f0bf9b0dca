"""`doctor PATH`: each thing that can be wrong with data is found, named, and has a remedy."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.prepare import text_io
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.data.token_dataset import ShardDataset
from gptforge.tokenizers import from_name, save

WORDS = ["what", "light", "through", "yonder", "window", "breaks", "it", "is", "the", "east"]


def some_text(seed: int, words: int = 60) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(words))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def shard(path: Path, ids) -> None:
    writer = ShardWriter(path, np.dtype(np.uint16))
    writer.write(np.array(ids, np.uint16))
    writer.close()


@pytest.fixture
def doctor(program):
    def examine(*args, code: int = 0) -> str:
        done = program("doctor", *args)
        assert (done.code, done.err) == (code, "")
        return done.out

    return examine


def test_a_text_is_judged_by_the_preset_that_is_named(tmp_path, doctor) -> None:
    text = some_text(1, 9000)
    (tmp_path / "t.txt").write_text(text)
    assert "windows of 1024" in doctor("t.txt")
    small = doctor("t.txt", "--preset", "shakespeare-cpu")
    assert f"{len(text):,} tokens, {(len(text) - 1) // 128} windows of 128" in small
    assert "windows of 64" in doctor("t.txt", "--preset", "shakespeare-cpu", "--context_length", 64)
    (tmp_path / "one.txt").write_text("x")
    assert "1 token, 0 windows of 128: use more text (" in doctor(
        "one.txt", "--preset", "shakespeare-cpu", code=1
    )


def test_a_good_text_gets_no_complaint(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text(some_text(1, 9000))
    said = doctor("t.txt", "--context_length", 64)
    assert "warning" not in said and "error" not in said
    assert "1 document, " in said
    assert "bytes a token with the tokenizer gpt2" in said
    assert "held out: the last 10% of the text" in said


def test_every_bad_place_is_listed_not_only_the_first(tmp_path, doctor) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    lines = [json.dumps({"text": some_text(i)}) for i in range(9)]
    lines[3], lines[6] = "not json", '{"body": 1}'
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    said = doctor(".", "--context_length", 8, code=1)
    assert "a.txt: not utf-8: byte 0xe9 at offset 3" in said
    assert "b.txt: NUL byte at offset 1" in said
    assert "c.jsonl, line 4: not JSON" in said
    assert "c.jsonl, line 7: no field 'text'" in said
    assert "7 documents" in said


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_text_is_an_error(tmp_path, doctor, content) -> None:
    (tmp_path / "t.txt").write_text(content)
    assert "error" in doctor("t.txt", code=1)


def test_what_is_not_there_is_an_error(doctor) -> None:
    assert "there is no such file" in doctor("nothing.txt", code=1)


def test_a_tiny_text_is_told_what_to_change(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text("Wherefore art thou Romeo?")
    n = len(from_name("gpt2", "").encode("Wherefore art thou Romeo?"))
    said = doctor("t.txt", code=1)
    assert f"error   {n} tokens, 0 windows of 1024: use --context_length {n - 1} at most" in said
    (tmp_path / "t.txt").write_text(some_text(1, 500))
    assert "soon know it by heart" in doctor("t.txt", "--context_length", 32)


def test_mended_text_and_plain_marks_are_pointed_out(tmp_path, doctor) -> None:
    mark = "<|endoftext|>"
    text = f"\ufeff{some_text(1)}\r\n{mark}\r\n{some_text(2)}"
    (tmp_path / "t.txt").write_bytes(text.encode())
    said = doctor("t.txt", "--context_length", 4)
    assert "dropped the byte order mark" in said
    assert "turned CRLF line ends into LF" in said
    assert f"{mark} stands in the text 1 time," in said
    assert "stands in the text" not in doctor("t.txt", "--context_length", 4, "--split_on", mark)


@pytest.mark.parametrize("block", [1, 5, 12, 13, 14, 29, 64])
def test_marks_that_lie_across_the_border_of_two_pieces_are_counted(
    tmp_path, doctor, monkeypatch, block
) -> None:
    # Texts are read in pieces, and each was once searched by itself.
    mark = "<|endoftext|>"
    parts = [
        "One",
        "Two twos",
        "",
        "Three",
        "Four \u00e9 and <|endof",
        "text|>",
        "Six" * 9,
        "Seven",
    ]
    text = mark.join(parts)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_io, "BLOCK_BYTES", block)
    said = doctor("t.txt", "--context_length", 4, "--tokenizer", "byte")
    assert f"{mark} stands in the text {text.count(mark)} times" in said


def test_documents_that_stand_twice_are_counted(tmp_path, doctor) -> None:
    texts = [some_text(i) for i in range(150)]
    jsonl(tmp_path / "d.jsonl", [*texts, *texts[:7]])
    said = doctor("d.jsonl", "--context_length", 16)
    assert "7 documents stand there a second time" in said
    assert "chosen by their hash" in said


def test_copies_of_a_few_documents_are_told_to_be_on_one_side(tmp_path, doctor) -> None:
    texts = [some_text(i) for i in range(10)]
    jsonl(tmp_path / "d.jsonl", [*texts, texts[0]])
    said = doctor("d.jsonl", "--context_length", 16)
    assert "1 document stands there a second time" in said
    assert "held out: the last documents, and all copies of one on one side" in said


def test_a_document_learned_and_held_out_by_name_is_pointed_out(tmp_path, doctor) -> None:
    (tmp_path / "d").mkdir()
    jsonl(tmp_path / "d" / "train.jsonl", [some_text(i) for i in range(10)])
    jsonl(tmp_path / "d" / "valid.jsonl", [some_text(i) for i in range(9, 12)])
    said = doctor("d", "--context_length", 16)
    assert "held out as named: d/valid.jsonl" in said
    assert "1 document stands on both sides of the split, first d/valid.jsonl" in said


def test_a_vocabulary_for_other_text_shows_in_bytes_a_token(tmp_path, doctor) -> None:
    dice = random.Random(0)
    text = "".join(chr(dice.randrange(0xAC00, 0xD7A0)) for _ in range(9000))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    said = doctor("t.txt", "--context_length", 16)
    assert "warning" in said and "gptforge tokenizer train" in said
    assert "warning" not in doctor("t.txt", "--context_length", 16, "--tokenizer", "byte")


def test_a_character_that_is_not_in_the_tokenizer_is_named(tmp_path, doctor) -> None:
    save(from_name("char", "abc "), tmp_path / "abc.json")
    (tmp_path / "t.txt").write_text("a cab, a cab")
    said = doctor("t.txt", "--tokenizer", "abc.json", code=1)
    assert "',' is not in this model's alphabet" in said


@pytest.fixture
def prepared(tmp_path) -> Path:
    texts = [some_text(i) for i in range(150)]
    jsonl(tmp_path / "d.jsonl", texts)
    prepare(tmp_path / "shards", PrepareRequest((str(tmp_path / "d.jsonl"),), val_fraction=0.2))
    return tmp_path / "shards"


def test_good_shards_get_no_complaint(prepared, doctor) -> None:
    said = doctor("shards", "--context_length", 16)
    assert "warning" not in said and "error" not in said
    assert "2 shards, all as index.json has them" in said
    assert "150 documents, each behind <|endoftext|>" in said


def test_a_shard_with_other_content_or_cut_short_is_found(prepared, doctor) -> None:
    path = prepared / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    assert "train_000000.bin: its content is not what index.json says" in doctor(
        "shards", "--context_length", 16, code=1
    )
    path.write_bytes(raw[:-2])
    assert "train_000000.bin: truncated" in doctor("shards", code=1)
    path.write_bytes(b"\0" * len(raw))
    assert "not a token shard" in doctor("shards", code=1)


def test_another_tokenizer_beside_the_shards_is_found(prepared, doctor) -> None:
    save(from_name("byte", ""), prepared / "tokenizer.json")
    said = doctor("shards", "--context_length", 16, code=1)
    assert "tokenizer.json is not the one that the shards were made with" in said


def test_another_tokenizer_than_the_shards_own_is_refused(prepared, doctor) -> None:
    said = doctor("shards", "--tokenizer", "byte", code=1)
    assert "prepared with the tokenizer gpt2" in said


def test_ids_outside_the_vocabulary_are_found_wherever_they_stand(tmp_path, doctor) -> None:
    ids = np.full(2_000_000, 7, np.uint16)
    ids[0] = 50256
    ids[1_000_000] = 60000
    shard(tmp_path / "train.bin", ids)
    said = doctor("train.bin", "--val_fraction", 0, code=1)
    assert "token id 60000 is outside the vocabulary of 50257" in said
    ids[1] = 50300
    shard(tmp_path / "train.bin", ids)
    said = doctor("train.bin", "--val_fraction", 0, code=1)
    assert "token id 50300 is outside the vocabulary of 50257" in said


def test_shards_made_with_another_vocabulary_show_in_bytes_a_token(tmp_path, doctor) -> None:
    ids = from_name("byte", "").encode(some_text(1, 9000))
    shard(tmp_path / "train.bin", ids)
    said = doctor("train.bin", "--val_fraction", 0)
    assert (
        "warning 1.00 bytes a token with the tokenizer gpt2: this vocabulary was made for other"
        in said
    )
    assert "bytes a token" not in doctor("train.bin", "--val_fraction", 0, "--tokenizer", "byte")


def test_shards_without_any_mark_are_pointed_out(tmp_path, doctor) -> None:
    shard(tmp_path / "train.bin", np.arange(300_000) % 50000)
    said = doctor("train.bin", "--val_fraction", 0)
    assert "no <|endoftext|> in the first and last" in said


def test_the_same_documents_in_train_and_val_shards_are_counted(tmp_path, doctor) -> None:
    texts = [[50256, *range(i, i + 50)] for i in range(40)]
    shard(tmp_path / "x_train_1.bin", [i for text in texts for i in text])
    shard(tmp_path / "x_val_1.bin", [i for text in texts[5:8] for i in text])
    said = doctor(".", "--context_length", 8)
    assert "3 documents stand on both sides, first document 1 of val" in said


def test_a_document_over_many_blocks_is_one(tmp_path, monkeypatch) -> None:
    from gptforge.data.token_dataset import read_shard_header
    from gptforge.doctor import shards as module

    ids = [9, 1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 9, 9, 1, 2]
    shard(tmp_path / "t.bin", ids)
    stream = ShardDataset([read_shard_header(tmp_path / "t.bin")], vocab_size=10)
    expected = list(module._digests(stream, 9))
    assert len(expected) == 3 and expected[0] == expected[1] != expected[2]
    for block in (1, 2, 3, 5):
        monkeypatch.setattr(module, "BLOCK_TOKENS", block)
        assert list(module._digests(stream, 9)) == expected


def test_the_findings_are_also_json(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text(some_text(1, 9000))
    record = json.loads(doctor("t.txt", "--context_length", 64, "--json"))
    assert record["ok"] is True
    assert {"level", "what", "remedy"} == set(record["findings"][0])


def test_training_says_and_refuses_the_same(tmp_path, program) -> None:
    ids = np.full(400_000, 7, np.uint16)
    shard(tmp_path / "train.bin", ids)
    flags = ("--preset", "debug", "--device", "cpu", "--max_steps", 1, "--warmup_steps", 1)
    run = program("--input", "train.bin", "--tokenizer", "gpt2", "--out_dir", "a", *flags)
    assert run.code == 0
    assert "warning: no <|endoftext|> in the first and last" in run.out
    ids[5] = 60000
    shard(tmp_path / "train.bin", ids)
    run = program("--input", "train.bin", "--tokenizer", "gpt2", "--out_dir", "b", *flags)
    assert run.code == 2
    assert "token id 60000 is outside the vocabulary of 50257" in run.err
    assert not (tmp_path / "b").exists()


def test_a_file_that_is_all_there_is_is_not_advised_to_be_left_out(tmp_path, doctor) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() * 99 + b"\xff")
    assert "--skip_bad" not in doctor("a.txt", code=1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes("é".encode() * 99 + b"\xff")
    (tmp_path / "d" / "b.txt").write_text(some_text(1))
    (tmp_path / "d" / "c.pdf").write_text("PDF")
    said = doctor("d", "--context_length", 4, code=1)
    assert "--skip_bad true" in said
    assert "1 file is left aside in d, by suffix: 1 .pdf" in said


def test_marks_in_json_lines_are_not_advised_to_be_split_on(tmp_path, doctor) -> None:
    jsonl(tmp_path / "d.jsonl", [f"{some_text(i)} <|endoftext|>" for i in range(9)])
    said = doctor("d.jsonl", "--context_length", 16)
    assert "stands in the text 9 times" in said
    assert "--split_on" not in said
