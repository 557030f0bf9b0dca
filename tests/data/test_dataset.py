"""What `--input` may name, and which tokens it gives."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from gptforge.data import dataset
from gptforge.data.dataset import (
    Dataset,
    DatasetOptions,
    check_length,
    open_dataset,
    resolve_input,
)
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.token_dataset import ShardWriter
from gptforge.errors import RunError, UserError
from gptforge.tokenizers import from_name
from gptforge.tokenizers.base import decode
from tests.programs import DEBUG


def open_input(path: Path, **options) -> Dataset:
    return open_dataset(path, DatasetOptions(**options))


def write_shard(path: Path, ids, dtype="<u2") -> Path:
    writer = ShardWriter(path, np.dtype(dtype))
    writer.write(np.array(ids, dtype))
    writer.close()
    return path


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37])
def test_single_text_is_cut_before_tokenizing(play, tokenizer, fraction) -> None:
    # Earlier versions did this in memory, and their checkpoints resume.
    text = play.read_text(encoding="utf-8") + "naïve 日本\n"
    play.write_text(text, encoding="utf-8")
    found = open_input(play, tokenizer=tokenizer, val_fraction=fraction)
    expected = from_name(tokenizer, text)
    assert found.tokenizer.to_json() == expected.to_json()
    cut = int(len(text) * (1 - fraction)) if fraction else len(text)
    for tokens, part in ((found.train, text[:cut]), (found.val, text[cut:])):
        np.testing.assert_array_equal(tokens[:], expected.encode(part))


def test_same_content_uses_the_same_cache_entry(play, tmp_path) -> None:
    first = open_input(play)
    copy = tmp_path / "copy.txt"
    copy.write_text(play.read_text())
    second = open_input(copy)
    assert first.train.shards == second.train.shards
    assert first.sha256 == second.sha256
    copy.write_text(play.read_text() + "more")
    assert open_input(copy).sha256 != first.sha256


def test_bad_input_names_the_prepare_command_that_skips_it(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"body": "caf\xe9"}\n' * 3 + b"{broken\n")
    text_format = TextFormat(field="body", encoding="latin-1")
    flags = r"--skip_bad true --field body --encoding latin-1`"
    command = rf"`gptforge prepare {path.as_posix()} --out DIR {flags}"
    with pytest.raises(UserError, match=f"line 4: not JSON: .*: {command}"):
        open_input(path, text_format=text_format)


def test_shards_of_the_prepare_command_that_skips_bad_input_are_accepted(program, tmp_path) -> None:
    path, out = tmp_path / "d.jsonl", tmp_path / "shards"
    rows = [json.dumps({"text": f"document {n} of some words"}) for n in range(300)]
    path.write_text("\n".join([*rows, "{broken"]))
    text = ("--tokenizer", "bpe", "--vocab_size", 300, "--val_fraction", 0.2)
    train = (*DEBUG, *text, "--split_by_name", "False", "--max_steps", 1, "--input")
    refused = program(*train, path)
    assert refused.code == 2
    command = re.search(r"`gptforge (prepare .*)`", refused.err)
    assert command, refused.err
    assert "--split_by_name false" in command[1]
    assert program(*shlex.split(command[1].replace("DIR", str(out)))).code == 0
    done = program(*train, out)
    assert done.code == 0, done.err


def test_hints_name_flags_of_training(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"body": "some words " * 9, "n": 1}) + "\n")
    with pytest.raises(UserError, match=r"it has body: choose one with --field$"):
        open_input(path)
    found = open_input(path, text_format=TextFormat(field="body"), tokenizer="byte")
    assert found.characters == 99
    (tmp_path / "d.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"offset 3: give its encoding, such as --encoding latin-1"):
        open_input(tmp_path / "d.txt")


def test_prepared_folder_determines_tokenizer_and_split(play, tmp_path) -> None:
    request = PrepareRequest((str(play),), tokenizer="char", val_fraction=0.2)
    prepare(tmp_path / "shards", request)
    found = open_input(tmp_path / "shards")
    assert (found.tokenizer.name, found.val_fraction) == ("char", 0.2)
    assert found.sha256 == open_input(play).sha256
    with pytest.raises(UserError, match=r"prepared with the tokenizer char .* leave --tokenizer"):
        open_input(tmp_path / "shards", tokenizer="gpt2", require_tokenizer=True)
    with pytest.raises(UserError, match=r"--val_fraction 0.2, not 0.1"):
        open_input(tmp_path / "shards", val_fraction=0.1, require_val_fraction=True)


def test_prepared_folder_with_a_changed_or_missing_shard(play, tmp_path) -> None:
    prepare(tmp_path / "shards", PrepareRequest((str(play),)))
    path = tmp_path / "shards" / "train_000000.bin"
    write_shard(path, [1, 2, 3])
    with pytest.raises(UserError, match=r"train_000000\.bin"):
        open_input(tmp_path / "shards")
    path.unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin: No such file"):
        open_input(tmp_path / "shards")


def test_unfinished_preparation_is_refused(play, tmp_path) -> None:
    out = tmp_path / "out"
    prepare(out, PrepareRequest((str(play),), tokenizer="char"))
    (out / "index.json").unlink()
    (out / ".preparing").mkdir()
    with pytest.raises(UserError, match="out is not finished: run the command that prepared it"):
        open_input(out)


def test_partial_shards_of_others_are_ignored(tmp_path) -> None:
    write_shard(tmp_path / "a_train.bin", [1, 2, 3])
    (tmp_path / ".b_train.partial.bin").write_bytes(b"incomplete")
    assert len(open_input(tmp_path, val_fraction=0.0).train) == 3


def test_shards_of_others_are_split_by_name(tmp_path) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", range(1000))
    write_shard(tmp_path / "fineweb_train_000002.bin", range(1000, 1500))
    write_shard(tmp_path / "fineweb_val_000000.bin", range(100))
    found = open_input(tmp_path)
    np.testing.assert_array_equal(found.train[:], np.arange(1500))
    np.testing.assert_array_equal(found.train[990:1010], np.arange(990, 1010))
    assert len(found.val) == 100
    assert any("GPT-2's vocabulary" in notice for notice in found.notices)
    single = open_input(tmp_path / "fineweb_train_000001.bin", val_fraction=0.1)
    assert (len(single.train), len(single.val)) == (900, 100)


def test_tokenizer_of_uint32_shards_must_be_named(tmp_path) -> None:
    write_shard(tmp_path / "train.bin", range(70000), "<u4")
    with pytest.raises(UserError, match="name it with --tokenizer"):
        open_input(tmp_path)


def test_tokenizer_beside_shards_without_an_index_must_be_named(play, tmp_path) -> None:
    prepare(tmp_path / "shards", PrepareRequest((str(play),), tokenizer="byte"))
    (tmp_path / "shards" / "index.json").unlink()
    with pytest.raises(UserError, match=r"name it with --tokenizer .*/shards/tokenizer\.json$"):
        open_input(tmp_path / "shards")
    tokenizer = str(tmp_path / "shards" / "tokenizer.json")
    found = open_input(tmp_path / "shards", tokenizer=tokenizer, require_tokenizer=True)
    assert found.tokenizer.vocab_size == from_name("byte", "").vocab_size


def test_raw_bin_of_nanogpt(tmp_path) -> None:
    np.arange(500, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="--raw_bin"):
        open_input(tmp_path)
    found = open_input(tmp_path, raw_bin=True)
    assert (len(found.train), len(found.val)) == (500, 50)
    write_shard(tmp_path / "train.bin", range(5))
    with pytest.raises(UserError, match="has a header"):
        open_input(tmp_path, raw_bin=True)


def test_id_outside_the_vocabulary_is_an_error_when_read(tmp_path) -> None:
    write_shard(tmp_path / "train.bin", [1, 2, 300, 4, 5])
    found = open_input(tmp_path, tokenizer="byte", require_tokenizer=True, val_fraction=0.0)
    assert found.train[0:2].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"train.bin: token id 300 is outside .* of 256"):
        found.train[1:4]


def test_documents_are_separated_by_eot(tmp_path) -> None:
    texts = [f"# Chapter {i}\n" * (1 + i) for i in range(3)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.md").write_text(text)
    for tokenizer in ("gpt2", "char", "byte"):
        found = open_input(tmp_path, tokenizer=tokenizer, val_fraction=0.3)
        text = decode(found.tokenizer, [*found.train[:], *found.val[:]])
        assert text == "".join("<|endoftext|>" + text for text in texts)
        assert found.train[0:1][0] == found.tokenizer.eot_token == found.val[0:1][0]


def test_text_shorter_than_a_sequence_is_refused(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh")
    short = open_input(path, tokenizer="char", val_fraction=0.0)
    with pytest.raises(UserError, match=r"--context_length 8 .* 8 tokens.*--context_length 7"):
        check_length(short, 8)
    check_length(short, 7)


def test_too_little_held_out_is_refused(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 2)
    with pytest.raises(UserError, match="--val_fraction"):
        check_length(open_input(path, tokenizer="char", val_fraction=0.05), 8)


def test_hint_for_too_little_held_out_by_name(tmp_path) -> None:
    (tmp_path / "train.txt").write_text("some words " * 50)
    (tmp_path / "val.txt").write_text("a")
    found = open_input(tmp_path, tokenizer="char")
    # The end-of-text token and a character: too few for a sequence.
    assert not found.val[2:].size
    assert found.more_val_hint.endswith("or use --split_by_name false")
    unnamed = open_input(tmp_path, tokenizer="char", split_by_name=False)
    assert "--val_fraction" in unnamed.more_val_hint


def test_cache_folder_that_is_not_writable(play, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(open_input(play).train) > 0


def test_full_disk_of_the_cache(play, monkeypatch) -> None:
    def fill_up(*_: object, **__: object) -> None:
        raise RunError("data/train_000000.bin: the disk is full: make room")

    monkeypatch.setattr("gptforge.data.cache.prepare", fill_up)
    with pytest.raises(RunError, match="disk is full: make room; it is the cache of prepared data"):
        open_input(play)


def test_default_input(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ROMEO" in resolve_input("").read_text(encoding="utf-8").upper()
    Path("input.txt").write_text("mine")
    assert resolve_input("").read_text() == "mine"
    assert resolve_input("other.txt") == Path("other.txt")


@pytest.fixture
def bundled_run(program, tmp_path, monkeypatch, play) -> Path:
    """A run on the bundled text, whose path is returned, of a program in another folder."""
    path = tmp_path / "site" / "gptforge" / "data" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(play.read_bytes())
    monkeypatch.setattr(dataset, "BUNDLED_PATHS", (path,))
    assert program(*DEBUG, "--max_steps", 2, "--out_dir", "run").code == 0
    return path


def test_run_on_the_bundled_text_survives_a_move_of_the_program(
    program, bundled_run, tmp_path, monkeypatch
) -> None:
    for config in (Path("run/config.toml"), *Path("run").glob("checkpoints/*/config.toml")):
        assert 'input = "bundled:input.txt"' in config.read_text()
        assert str(tmp_path) not in config.read_text()
    moved = tmp_path / "elsewhere" / "input.txt"
    moved.parent.mkdir()
    bundled_run.rename(moved)
    monkeypatch.setattr(dataset, "BUNDLED_PATHS", (moved,))
    Path("input.txt").write_text("not the bundled text")
    assert program("eval", "run", "--device", "cpu").code == 0
    config = ("--config", "run/config.toml", "--device", "cpu")
    assert program(*config, "--max_steps", 3, "--out_dir", "run").code == 0
    assert program(*config, "--out_dir", "other").code == 0


def test_run_of_an_earlier_version_finds_the_bundled_text(program, bundled_run) -> None:
    config = Path("run/config.toml")
    old_path = '"/opt/old/lib/gptforge/input.txt"'
    config.write_text(config.read_text().replace('"bundled:input.txt"', old_path))
    done = program("--config", config, "--device", "cpu", "--max_steps", 3, "--out_dir", "run")
    assert done.code == 0, done.err
    assert "/opt/old/lib/gptforge/input.txt" in done.out and "bundled:input.txt" in done.out
    # An explicit path is not replaced.
    done = program(*DEBUG, "--input", "/opt/old/input.txt", "--out_dir", "other")
    assert done.code == 2
    assert "/opt/old/input.txt: there is no such file" in done.err


def test_flags_without_effect_are_noted(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("some words and more " * 50)
    options = {"raw_bin": True, "text_format": TextFormat(field="body")}
    notices = open_input(tmp_path / "t.txt", **options).notices
    assert any(notice.startswith("--raw_bin has no effect") for notice in notices)
    assert any(notice.startswith("--field has no effect") for notice in notices)
    prepare(tmp_path / "prepared", PrepareRequest((str(tmp_path / "t.txt"),)))
    notices = open_input(tmp_path / "prepared", **options).notices
    assert [notice.partition(":")[0] for notice in notices] == [
        "--field has no effect on token shards",
        "--raw_bin has no effect",
    ]
    write_shard(tmp_path / "train.bin", range(500))
    notices = open_input(tmp_path / "train.bin", text_format=TextFormat(field="body")).notices
    assert "--field has no effect on token shards" in notices
