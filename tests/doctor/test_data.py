"""`gptforge doctor PATH`: finds and names what can be wrong with data, and says how to fix it."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.prepare import text_io
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.token_dataset import ShardWriter
from gptforge.tokenizers import from_name, save
from gptforge.tokenizers.base import END_OF_TEXT as EOT

WORDS = ["what", "light", "through", "yonder", "window", "breaks", "it", "is", "the", "east"]


def make_text(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


TEXTS = [make_text(i) for i in range(150)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def write_shard(path: Path, ids) -> None:
    writer = ShardWriter(path, np.dtype(np.uint16))
    writer.write(np.array(ids, np.uint16))
    writer.close()


@pytest.fixture
def doctor(program):
    """The output of the command, whose exit code must be `code`."""

    def run(*args, code: int = 0) -> str:
        done = program("doctor", *args)
        assert (done.code, done.err) == (code, "")
        return done.out

    return run


def test_preset_determines_tokenizer_and_context_length(tmp_path, doctor) -> None:
    text = make_text(1, 9000)
    (tmp_path / "t.txt").write_text(text)
    assert "sequences of 1024" in doctor("t.txt")
    flags = ("t.txt", "--preset", "debug")
    out = doctor(*flags)
    num_sequences = (int(0.9 * len(text)) - 1) // 32  # a tenth is held out
    assert f"{len(text):,} tokens, {num_sequences:,} sequences of 32 to train on" in out
    assert "sequences of 64" in doctor(*flags, "--context_length", 64)
    (tmp_path / "t.txt").write_text("x")
    out = doctor(*flags, code=1)
    assert "1 token, 0 sequences of 32 to train on: use more text (" in out
    assert "1 document, 1 character, 1 byte\n" in out


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [("gpt2", TEXTS), ("char", TEXTS), ("byte", TEXTS), ("char", TEXTS[:1])],
    ids=["gpt2", "char", "byte", "one document"],
)
def test_the_number_of_tokens_is_that_of_training(tmp_path, doctor, tokenizer, texts) -> None:
    write_jsonl(tmp_path / "data.jsonl", texts)
    out = doctor("data.jsonl", "--tokenizer", tokenizer, "--context_length", 8)
    request = PrepareRequest((str(tmp_path / "data.jsonl"),), tokenizer=tokenizer)
    index = prepare(tmp_path / "shards", request, num_workers=1)
    count = index.total("train", "tokens") + index.total("val", "tokens")
    assert f" {count:,} tokens, " in out and "about" not in out


def test_the_number_of_bpe_tokens_is_an_estimate(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text(make_text(1, 9000))
    assert " about " in doctor("t.txt", "--tokenizer", "bpe", "--context_length", 8)


def test_a_small_held_out_share_is_not_rounded_to_zero(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text(make_text(1, 9000))
    out = doctor("t.txt", "--context_length", 8, "--val_fraction", 0.001)
    assert "held out: the last 0.1% of the text" in out


def test_good_text(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_text(make_text(1, 9000))
    out = doctor("t.txt", "--context_length", 64)
    assert "warning" not in out and "error" not in out
    assert "1 document, " in out
    assert "with the tokenizer gpt2" in out
    assert "held out: the last 10% of the text" in out
    record = json.loads(doctor("t.txt", "--context_length", 64, "--json"))
    assert record["ok"] is True
    assert "level" in record["findings"][0]


def test_all_bad_input_is_listed(tmp_path, doctor) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"a\0b")
    lines = [json.dumps({"text": text}) for text in TEXTS[:9]]
    lines[3], lines[6] = "not json", '{"body": 1}'
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    out = doctor(".", "--context_length", 8, code=1)
    assert "a.txt: not utf-8: byte 0xe9 at offset 3" in out
    assert "b.txt: NUL byte at offset 1" in out
    assert "c.jsonl, line 4: not JSON" in out
    assert "c.jsonl, line 7: no field 'text'" in out
    assert "7 documents" in out


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_text(tmp_path, doctor, content) -> None:
    (tmp_path / "t.txt").write_text(content)
    assert "error" in doctor("t.txt", code=1)


def test_missing_file(doctor) -> None:
    assert "there is no such file" in doctor("nothing.txt", code=1)


def test_tiny_text(tmp_path, doctor) -> None:
    text = "Wherefore art thou Romeo?"
    (tmp_path / "t.txt").write_text(text)
    n = len(from_name("gpt2", "").encode(text))
    out = doctor("t.txt", "--val_fraction", 0, code=1)
    message = f"error   {n} tokens, 0 sequences of 1024 to train on"
    assert f"{message}: use --context_length {n - 1} at most" in out
    (tmp_path / "t.txt").write_text(make_text(1, 500))
    assert "soon memorize it" in doctor("t.txt", "--context_length", 32)


@pytest.mark.parametrize("num_documents", [1, 3, 150])
@pytest.mark.parametrize("by_name", [False, True])
def test_sequences_are_those_of_the_training_part(
    tmp_path, doctor, program, num_documents, by_name
) -> None:
    texts = [make_text(seed, 40) for seed in range(num_documents)]
    (tmp_path / "t").mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "t" / "train.jsonl").write_text("".join(lines))
    if by_name:
        (tmp_path / "t" / "val.jsonl").write_text(json.dumps({"text": make_text(999, 300)}))
    flags = ("t", "--preset", "debug")
    found = re.search(r"([\d,]+) sequences of 32 to train on", doctor(*flags))
    planned = json.loads(program("plan", "--json", "--input", *flags).out)
    num_sequences = (planned["text"]["tokens"] - 1) // 32
    tolerance = 0.1 * num_sequences if num_documents == 150 else 1  # some, by a hash
    assert int(found[1].replace(",", "")) == pytest.approx(num_sequences, abs=tolerance)


def test_a_damaged_file_is_not_said_to_have_no_text(tmp_path, doctor) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 au lait")
    out = doctor("t.txt", code=1)
    assert "utf-8" in out.lower()
    assert "no text" not in out


def test_normalization_and_literal_eot(tmp_path, doctor) -> None:
    text = f"\ufeff{TEXTS[1]}\r\n{EOT}\r\n{TEXTS[2]}"
    (tmp_path / "t.txt").write_bytes(text.encode())
    out = doctor("t.txt", "--context_length", 4)
    assert "dropped the byte order mark" in out
    assert "turned CRLF line ends into LF" in out
    assert f"the text contains {EOT} 1 time," in out
    assert "text contains" not in doctor("t.txt", "--context_length", 4, "--split_on", EOT)


@pytest.mark.parametrize("block", [1, 5, 12, 13, 14, 29, 64])
def test_literal_eot_across_chunks(tmp_path, doctor, monkeypatch, block) -> None:
    parts = (
        "One",
        "Two twos",
        "",
        "Three",
        "Four \u00e9 and <|endof",
        "text|>",
        "Six" * 9,
        "Seven",
    )
    text = EOT.join(parts)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_io, "BLOCK_BYTES", block)
    out = doctor("t.txt", "--context_length", 4, "--tokenizer", "byte")
    assert f"the text contains {EOT} {text.count(EOT)} times" in out


def test_literal_eot_in_json_lines_is_not_split_on(tmp_path, doctor) -> None:
    write_jsonl(tmp_path / "d.jsonl", [f"{text} {EOT}" for text in TEXTS[:9]])
    out = doctor("d.jsonl", "--context_length", 16)
    assert f"the text contains {EOT} 9 times" in out
    assert "--split_on" not in out


def test_duplicates_among_many_documents(tmp_path, doctor) -> None:
    write_jsonl(tmp_path / "d.jsonl", [*TEXTS, *TEXTS[:7]])
    out = doctor("d.jsonl", "--context_length", 16)
    assert "7 documents are duplicates" in out
    assert "chosen by their hash" in out


def test_duplicates_among_few_documents(tmp_path, doctor) -> None:
    write_jsonl(tmp_path / "d.jsonl", [*TEXTS[:10], TEXTS[0]])
    out = doctor("d.jsonl", "--context_length", 16)
    assert "1 document is a duplicate" in out
    assert "held out: the last documents, with all duplicates of a document in one split" in out


def test_duplicates_across_files_held_out_by_name(tmp_path, doctor) -> None:
    write_jsonl(tmp_path / "d" / "train.jsonl", TEXTS[:10])
    write_jsonl(tmp_path / "d" / "valid.jsonl", TEXTS[9:12])
    out = doctor("d", "--context_length", 16)
    assert "d/valid.jsonl" in out
    assert "1 document is in both splits, first d/valid.jsonl" in out


def test_vocabulary_of_other_text(tmp_path, doctor) -> None:
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0xAC00, 0xD7A0)) for _ in range(9000))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    out = doctor("t.txt", "--context_length", 16)
    assert "warning" in out and "gptforge tokenizer train" in out
    assert "warning" not in doctor("t.txt", "--context_length", 16, "--tokenizer", "byte")


def test_character_that_the_tokenizer_lacks(tmp_path, doctor) -> None:
    save(from_name("char", "abc "), tmp_path / "abc.json")
    (tmp_path / "t.txt").write_text("a cab, a cab")
    out = doctor("t.txt", "--tokenizer", "abc.json", code=1)
    assert "',' is not in this model's alphabet" in out


def test_unknown_tokenizer_is_a_usage_error(tmp_path, program) -> None:
    (tmp_path / "t.txt").write_text(TEXTS[0])
    assert program("doctor", "t.txt", "--tokenizer", "bert").code == 2


def test_skip_bad_is_not_suggested_for_the_only_file(tmp_path, doctor) -> None:
    raw = "é".encode() * 99 + b"\xff"
    (tmp_path / "a.txt").write_bytes(raw)
    assert "--skip_bad" not in doctor("a.txt", code=1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_bytes(raw)
    (tmp_path / "d" / "b.txt").write_text(TEXTS[1])
    (tmp_path / "d" / "c.pdf").write_text("PDF")
    out = doctor("d", "--context_length", 4, code=1)
    assert "--skip_bad true" in out
    assert "1 .pdf" in out


@pytest.fixture
def prepared(tmp_path) -> Path:
    write_jsonl(tmp_path / "d.jsonl", TEXTS)
    prepare(tmp_path / "shards", PrepareRequest((str(tmp_path / "d.jsonl"),), val_fraction=0.2))
    return tmp_path / "shards"


def test_good_shards(prepared, doctor) -> None:
    out = doctor("shards", "--context_length", 16)
    assert "warning" not in out and "error" not in out
    assert "2 shards, with the hashes in index.json" in out
    assert f"150 documents, each after {EOT}" in out


def test_changed_and_truncated_shards(prepared, doctor) -> None:
    path = prepared / "train_000000.bin"
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    out = doctor("shards", "--context_length", 16, code=1)
    assert "train_000000.bin: its content differs from its hash in index.json" in out
    path.write_bytes(raw[:-2])
    assert "train_000000.bin: truncated" in doctor("shards", code=1)
    path.write_bytes(b"\0" * len(raw))
    assert "not a token shard" in doctor("shards", code=1)


def test_other_tokenizer_than_that_of_the_shards(prepared, doctor) -> None:
    out = doctor("shards", "--tokenizer", "byte", code=1)
    assert "prepared with the tokenizer gpt2" in out
    save(from_name("byte", ""), prepared / "tokenizer.json")
    out = doctor("shards", "--context_length", 16, code=1)
    assert "tokenizer.json is not the one that the shards were made with" in out


@pytest.mark.parametrize("position", [1, 1_000_000])
def test_ids_outside_the_vocabulary(tmp_path, doctor, position) -> None:
    ids = np.full(2_000_000, 7, np.uint16)
    ids[0], ids[position] = 50256, 60000
    write_shard(tmp_path / "train.bin", ids)
    out = doctor("train.bin", "--val_fraction", 0, code=1)
    assert "token id 60000 is outside the vocabulary of 50257" in out


def test_shards_of_another_vocabulary(tmp_path, doctor) -> None:
    write_shard(tmp_path / "train.bin", from_name("byte", "").encode(make_text(1, 9000)))
    flags = ("train.bin", "--val_fraction", 0)
    assert "warning 1.00 bytes" in doctor(*flags)
    assert "1.00 bytes" not in doctor(*flags, "--tokenizer", "byte")


def test_duplicates_across_shards(tmp_path, doctor) -> None:
    documents = [[50256, *range(i, i + 50)] for i in range(40)]
    write_shard(tmp_path / "x_train_1.bin", [i for ids in documents for i in ids])
    write_shard(tmp_path / "x_val_1.bin", [i for ids in documents[5:8] for i in ids])
    out = doctor(".", "--context_length", 8)
    assert "3 documents are in both splits, first document 1 of val" in out


def test_training_reports_the_same(tmp_path, program, doctor) -> None:
    ids = np.full(400_000, 7, np.uint16)
    write_shard(tmp_path / "train.bin", ids)
    warning = f"warning no {EOT} in the first and last"
    assert warning in doctor("train.bin", "--val_fraction", 0)
    flags = ("--preset", "debug", "--device", "cpu", "--max_steps", 1, "--warmup_steps", 1)
    flags += ("--input", "train.bin", "--tokenizer", "gpt2", "--val_fraction", 0, "--out_dir")
    done = program(*flags, "a")
    assert done.code == 0
    assert warning.replace("warning ", "warning: ") in done.out
    ids[5] = 60000
    write_shard(tmp_path / "train.bin", ids)
    done = program(*flags, "b")
    assert done.code == 2
    assert "token id 60000 is outside the vocabulary of 50257" in done.err
    assert not (tmp_path / "b").exists()


def test_a_document_that_is_cut_into_both_splits_counts_once(tmp_path, doctor) -> None:
    ids = from_name("gpt2", "").encode(TEXTS[0])
    write_shard(tmp_path / "data.bin", [id for _ in range(9) for id in (50256, *ids)])
    assert "9 documents, each after" in doctor("data.bin", "--context_length", 8)
