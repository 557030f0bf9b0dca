"""Notices about the choice of files: ignored ones, copies, and end-of-text marks in the text."""

from pathlib import Path

from gptforge.data.dataset import Dataset, DatasetOptions, open_dataset
from gptforge.data.prepare.request import (
    FINGERPRINT_BYTES,
    PrepareRequest,
    fingerprint,
    select_files,
)
from gptforge.data.prepare.text_io import TextFormat
from tests.data.prepare.small_datasets import some_text


def notices(*names: Path) -> tuple[str, ...]:
    return select_files(PrepareRequest(tuple(map(str, names)))).notices


def open_bytes(path: Path, **options) -> Dataset:
    return open_dataset(path, DatasetOptions(tokenizer="byte", **options))


def test_ignored_files_are_counted_by_suffix(tmp_path) -> None:
    for name in ("a.txt", "b.pdf", "sub/c.PDF", "d.json", "sub/README", ".hidden.doc"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    (notice,) = notices(tmp_path / "d")
    assert notice.startswith("4 files are ignored in ")
    assert notice.endswith("by suffix: 2 .pdf, 1 .json, 1 without")
    assert notices(tmp_path / "d" / "*.txt") == ()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    (tmp_path / "one" / "b.csv").write_text("b")
    assert "1 file is ignored" in notices(tmp_path / "one")[0]


def test_links_in_a_folder_that_are_not_followed_are_counted(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("text")
    (tmp_path / "d" / "b.txt").symlink_to("a.md")
    (tmp_path / "d" / "more").symlink_to("..", target_is_directory=True)
    (notice,) = notices(tmp_path / "d")
    assert notice.endswith("by suffix: 1 broken link, 1 link to a folder")


def test_separator_that_is_not_in_the_text_is_reported(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n")

    def notices_of(separator: str) -> tuple[str, ...]:
        return open_bytes(tmp_path, text_format=TextFormat(split_on=separator)).notices

    assert not any("--split_on" in notice for notice in notices_of("\n\n") + notices_of("two"))
    (notice,) = notices_of(r"\n\n")
    assert notice.startswith(r"--split_on '\n\n' is not in the text: each file is one document; a ")


def test_copies_are_reported_but_not_files_with_equal_fingerprints(tmp_path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("the same text")
    (tmp_path / "d.txt").write_text("another text.")
    (notice,) = notices(tmp_path)
    assert "b.txt is a copy of" in notice
    assert "and so are 1 more files" in notice
    assert "read again" in notice
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).unlink()
    long = "x" * FINGERPRINT_BYTES + "{}" + "y" * FINGERPRINT_BYTES
    (tmp_path / "e.txt").write_text(long.format("1"))
    (tmp_path / "f.txt").write_text(long.format("2"))
    assert fingerprint(tmp_path / "e.txt") == fingerprint(tmp_path / "f.txt")
    assert notices(tmp_path) == ()


def test_copy_in_the_other_named_split_is_reported(tmp_path) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("the same text")
    assert any("held-out text is trained on" in notice for notice in notices(tmp_path))


def test_copies_of_few_documents_are_kept_in_one_split(tmp_path) -> None:
    for number, seed in enumerate([1, 2, 3, 4, 1]):
        (tmp_path / f"{number}.txt").write_text(some_text(seed), "utf-8")
    dataset = open_bytes(tmp_path, val_fraction=0.4)
    assert len(dataset.val) == len(some_text(4).encode()) + 1
    notice = "1 document appears in the text more than once: all copies are in one split"
    assert notice in dataset.notices


def test_equal_documents_in_both_splits_are_reported(tmp_path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(some_text(1), "utf-8")
    assert any(n.startswith("1 document is in both splits") for n in open_bytes(tmp_path).notices)


def test_literal_end_of_text_marks_are_reported_each_time(tmp_path, messages) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some words<|endoftext|>\n" * 400)
    for _ in range(2):
        (notice,) = open_dataset(path, DatasetOptions()).notices
        assert notice.startswith("<|endoftext|> stands in the text 400 times, as plain characters")
        assert "--split_on '<|endoftext|>'" in notice
    assert messages == [f"note: {notice}"]
