"""What `--input` may name, and that it gives the tokens it should."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.dataset import (
    Dataset,
    DatasetOptions,
    check_length,
    open_dataset,
)
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import RunError, UserError
from gptforge.tokenizers import decode, from_name


def quiet(_: str) -> None:
    pass


def corpus(path: Path, **wanted) -> Dataset:
    return open_dataset(path, DatasetOptions(**wanted), log=quiet)


def shard(path: Path, ids, dtype="<u2") -> Path:
    writer = ShardWriter(path, np.dtype(dtype))
    writer.write(np.array(ids, dtype))
    writer.close()
    return path


@pytest.mark.parametrize("tokenizer", ["gpt2", "char", "byte"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.37])
def test_one_text_gives_the_tokens_of_its_two_halves(play, tokenizer, fraction) -> None:
    # What earlier versions did in memory, and what their checkpoints go on with.
    text = play.read_text(encoding="utf-8") + "naïve 日本\n"
    play.write_text(text, encoding="utf-8")
    made = corpus(play, tokenizer=tokenizer, val_fraction=fraction)
    known = from_name(tokenizer, text)
    assert made.tokenizer.to_json() == known.to_json()
    cut = int(len(text) * (1 - fraction)) if fraction else len(text)
    for stream, part in ((made.train, text[:cut]), (made.val, text[cut:])):
        np.testing.assert_array_equal(stream[:], known.encode(part))


def test_a_text_is_known_by_its_content_alone(play, tmp_path) -> None:
    first = corpus(play)
    copy = tmp_path / "copy.txt"
    copy.write_text(play.read_text())
    second = corpus(copy)
    # The same shards, in the cache.
    assert first.train.shards == second.train.shards
    assert first.sha256 == second.sha256
    copy.write_text(play.read_text() + "more")
    assert corpus(copy).sha256 != first.sha256


def test_what_only_prepare_can_leave_out_is_refused_with_its_command(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"{broken\n")
    command = rf"`gptforge prepare {path.as_posix()} --out DIR --skip_bad true`"
    with pytest.raises(
        UserError, match=f"line 1: not JSON: .*, or leave such things out: {command}"
    ):
        corpus(path)


def test_a_field_is_refused_with_trainings_own_flag_which_reads_it(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"body": "some words " * 9, "n": 1}) + "\n")
    with pytest.raises(UserError, match=r"it has body: choose one with --field$"):
        corpus(path)
    assert corpus(path, form=TextFormat(field="body"), tokenizer="byte").characters == 99


def test_what_an_encoding_would_mend_is_refused_with_trainings_own_flag(tmp_path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"offset 3: say what it is with --encoding latin-1, or"):
        corpus(path)


def test_a_folder_that_was_prepared_brings_its_tokenizer_and_its_held_out_part(
    play, tmp_path
) -> None:
    prepare(tmp_path / "shards", PrepareRequest((str(play),), tokenizer="char", val_fraction=0.2))
    made = corpus(tmp_path / "shards")
    assert (made.tokenizer.name, made.val_fraction) == ("char", 0.2)
    assert made.sha256 == corpus(play).sha256
    with pytest.raises(UserError, match=r"prepared with the tokenizer char .* leave --tokenizer"):
        corpus(tmp_path / "shards", tokenizer="gpt2", insists_on_tokenizer=True)
    with pytest.raises(UserError, match=r"--val_fraction 0.2, not 0.1"):
        corpus(tmp_path / "shards", val_fraction=0.1, insists_on_fraction=True)


def test_a_prepared_folder_that_lost_a_shard_is_refused(play, tmp_path) -> None:
    prepare(tmp_path / "shards", PrepareRequest((str(play),)))
    whole = tmp_path / "shards" / "train_000000.bin"
    shard(whole, [1, 2, 3])
    with pytest.raises(UserError, match=r"train_000000\.bin is not what index\.json says"):
        corpus(tmp_path / "shards")
    whole.unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin: No such file"):
        corpus(tmp_path / "shards")


def test_a_folder_whose_preparation_was_interrupted_is_refused(play, tmp_path) -> None:
    out = tmp_path / "out"
    prepare(out, PrepareRequest((str(play),), tokenizer="char"))
    (out / "index.json").unlink()
    (out / ".preparing").mkdir()
    with pytest.raises(UserError, match="out is not finished: the command that prepared it"):
        corpus(out)


def test_half_written_shards_of_others_are_passed_over(tmp_path) -> None:
    shard(tmp_path / "a_train.bin", [1, 2, 3])
    (tmp_path / ".b_train.partial.bin").write_bytes(b"not yet")
    assert len(corpus(tmp_path, val_fraction=0.0).train) == 3


def test_shards_of_others_are_read_as_they_lie(tmp_path) -> None:
    shard(tmp_path / "fineweb_train_000001.bin", range(1000))
    shard(tmp_path / "fineweb_train_000002.bin", range(1000, 1500))
    shard(tmp_path / "fineweb_val_000000.bin", range(100))
    made = corpus(tmp_path)
    np.testing.assert_array_equal(made.train[:], np.arange(1500))
    np.testing.assert_array_equal(made.train[990:1010], np.arange(990, 1010))
    assert len(made.val) == 100
    assert any("GPT-2's vocabulary" in notice for notice in made.notices)
    alone = corpus(tmp_path / "fineweb_train_000001.bin", val_fraction=0.1)
    assert (len(alone.train), len(alone.val)) == (900, 100)


def test_large_vocabularies_must_be_named(tmp_path) -> None:
    shard(tmp_path / "train.bin", range(70000), "<u4")
    with pytest.raises(UserError, match="say it with --tokenizer"):
        corpus(tmp_path)


def test_nanogpts_form_is_read_when_it_is_asked_for(tmp_path) -> None:
    np.arange(500, dtype="<u2").tofile(tmp_path / "train.bin")
    np.arange(50, dtype="<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(UserError, match="--headerless"):
        corpus(tmp_path)
    made = corpus(tmp_path, headerless=True)
    assert (len(made.train), len(made.val)) == (500, 50)
    shard(tmp_path / "train.bin", range(5))
    with pytest.raises(UserError, match="has a header"):
        corpus(tmp_path, headerless=True)


def test_an_id_outside_the_vocabulary_is_found_when_it_is_read(tmp_path) -> None:
    shard(tmp_path / "train.bin", [1, 2, 300, 4, 5])
    made = corpus(tmp_path, tokenizer="byte", insists_on_tokenizer=True, val_fraction=0.0)
    assert made.train[0:2].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"train.bin: token id 300 is outside .* of 256"):
        made.train[1:4]


def test_documents_are_kept_apart(tmp_path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.md").write_text(f"# Chapter {i}\n" * (1 + i))
    for tokenizer in ("gpt2", "char", "byte"):
        made = corpus(tmp_path, tokenizer=tokenizer, val_fraction=0.3)
        text = decode(made.tokenizer, [*made.train[:], *made.val[:]])
        parts = [f"# Chapter {i}\n" * (1 + i) for i in range(3)]
        assert text == "".join("<|endoftext|>" + part for part in parts)
        assert made.train[0:1][0] == made.tokenizer.eot_token == made.val[0:1][0]


def test_a_text_shorter_than_a_window_is_refused_with_its_length(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh")
    short = corpus(path, tokenizer="char", val_fraction=0.0)
    with pytest.raises(UserError, match=r"--context_length 8 .* 8 tokens.*--context_length 7"):
        check_length(short, 8)
    check_length(short, 7)


def test_too_little_held_out_to_judge_is_refused(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 2)
    with pytest.raises(UserError, match="--val_fraction"):
        check_length(corpus(path, tokenizer="char", val_fraction=0.05), 8)


def test_a_home_that_cannot_be_written_does_not_matter(play, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(corpus(play).train) > 0


def test_a_full_disk_of_the_cache_is_told_as_that(play, monkeypatch) -> None:
    def fill_up(*_: object, **__: object) -> None:
        raise RunError("data/train_000000.bin: the disk is full: make room")

    monkeypatch.setattr("gptforge.data.cache.prepare", fill_up)
    with pytest.raises(RunError, match="disk is full: make room; it is the cache of prepared data"):
        corpus(play)


def test_too_little_held_out_by_name_has_a_remedy_of_its_own(tmp_path) -> None:
    (tmp_path / "train.txt").write_text("some words " * 50)
    (tmp_path / "val.txt").write_text("a")
    made = corpus(tmp_path, tokenizer="char")
    # The document's mark and a character are two tokens, one too few for a window.
    assert made.more_val_hint.endswith("or use --split_by_name false")
    assert not made.val[2:].size
    mixed = corpus(tmp_path, tokenizer="char", split_by_name=False)
    assert "--val_fraction" in mixed.more_val_hint


def test_the_command_that_leaves_out_what_is_bad_reads_as_training_does(tmp_path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"body": "caf\xe9"}\n' * 3 + b"{broken\n")
    flags = r"--skip_bad true --field body --encoding latin-1`"
    with pytest.raises(UserError, match=flags):
        corpus(path, form=TextFormat(field="body", encoding="latin-1"))
