"""What is said of the choice of files: those left aside, copies, and literal marks."""

from pathlib import Path

from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.prepare.request import (
    FINGERPRINT_BYTES,
    PrepareRequest,
    fingerprint,
    select_files,
)
from tests.data.test_prepare import some_text


def notices(*names: Path) -> tuple[str, ...]:
    return select_files(PrepareRequest(tuple(map(str, names)))).notices


def test_files_of_a_folder_that_are_left_aside_are_counted_by_suffix(tmp_path) -> None:
    for name in ("a.txt", "b.pdf", "sub/c.PDF", "d.json", "sub/README", ".hidden.doc"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(name)
    (said,) = notices(tmp_path / "d")
    assert said.startswith("4 files are left aside in ")
    assert said.endswith("by suffix: 2 .pdf, 1 .json, 1 without")
    assert notices(tmp_path / "d" / "*.txt") == ()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    (tmp_path / "one" / "b.csv").write_text("b")
    assert "1 file is left aside" in notices(tmp_path / "one")[0]


def test_copies_are_said_once_and_what_only_looks_alike_is_not(tmp_path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("the same text")
    (tmp_path / "d.txt").write_text("another text.")
    (said,) = notices(tmp_path)
    assert "b.txt is a copy of" in said
    assert "and so are 1 more files" in said
    assert "read again" in said
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).unlink()
    long = "x" * FINGERPRINT_BYTES + "{}" + "y" * FINGERPRINT_BYTES
    (tmp_path / "e.txt").write_text(long.format("1"))
    (tmp_path / "f.txt").write_text(long.format("2"))
    assert fingerprint(tmp_path / "e.txt") == fingerprint(tmp_path / "f.txt")
    assert notices(tmp_path) == ()


def test_a_copy_on_the_other_side_of_a_named_split_is_said(tmp_path) -> None:
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("the same text")
    assert any("what is held out is learned as well" in said for said in notices(tmp_path))


def test_copies_of_few_documents_are_on_one_side_and_said(tmp_path) -> None:
    for number, seed in enumerate([1, 2, 3, 4, 1]):
        (tmp_path / f"{number}.txt").write_text(some_text(seed), "utf-8")
    wanted = DatasetOptions(tokenizer="byte", val_fraction=0.4)
    corpus = open_dataset(tmp_path, wanted, log=lambda text: None)
    assert len(corpus.val) == len(some_text(4).encode()) + 1
    words = "1 document stands in the text more than once: all copies are on one side"
    assert words in corpus.notices


def test_literal_marks_are_counted_and_said_each_time(tmp_path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("some words<|endoftext|>\n" * 400)
    said: list[str] = []
    for _ in range(2):
        corpus = open_dataset(path, DatasetOptions(), log=said.append)
        (notice,) = corpus.notices
        assert notice.startswith("<|endoftext|> stands in the text 400 times, as plain characters")
        assert "--split_on '<|endoftext|>'" in notice
    assert said == [f"note: {notice}"]


def test_where_all_documents_are_the_same_it_is_said_that_nothing_is_kept_apart(tmp_path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(some_text(1), "utf-8")
    corpus = open_dataset(tmp_path, DatasetOptions(tokenizer="byte"), log=lambda text: None)
    assert any(said.startswith("1 document is both learned") for said in corpus.notices)
