"""Which files a name stands for."""

import glob
import gzip
import os
import threading
from pathlib import Path

import pytest

from gptforge.data.prepare import sources
from gptforge.data.prepare.sources import find_sources
from gptforge.errors import UserError


def test_what_programs_keep_in_a_folder_of_texts_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = ("a.txt", "b.text", "c/d.markdown", "c/e.ndjson", "checkpoints/f.MD")
    strange = ("package.json", "c/index.json", ".git/g.txt", "runs/x/log.md", "runs/x/config.toml",
               "runs/x/metrics.jsonl", "runs/x/checkpoints/last/config.json")  # fmt: skip
    for name in (*kept, *strange):
        path = Path("texts", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [source.name for source in find_sources(["texts"])] == [f"texts/{name}" for name in kept]


def test_a_json_that_is_named_is_taken_at_its_word(tmp_path) -> None:
    (tmp_path / "a.json").touch()
    for name in (tmp_path / "a.json", tmp_path / "*.json"):
        assert [source.kind for source in find_sources([str(name)])] == ["jsonl"]


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        (["run/config.toml", "run/checkpoints/last"], "run", "--init_from run begins with"),
        (["m/config.json", "m/model.safetensors", "m/README.md"], "m", "--init_from m begins with"),
        ([], "https://example.com/text.txt", "addresses are not read"),
    ],
)
def test_what_is_no_text_is_told_apart(tmp_path, monkeypatch, files, name, words) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with pytest.raises(UserError, match=words):
        find_sources([name])


def names(pattern: str) -> list[str]:
    return [source.name for source in find_sources([pattern])]


def plant(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")


def test_patterns_stand_for_what_glob_says(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant("a.txt", "b.md", ".h.txt", "x/a.txt", "x/y/z/a.txt", "x/.h/a.txt", ".g/a.txt", "x1/b.txt")
    patterns = ["*.txt", "**/*.txt", "x/**/*.txt", "**", "x/**", "?/a.txt", "x[0-9]/*", ".*.txt"]
    for pattern in [*patterns, "**/y/**/*.txt", "*/*.txt", f"{tmp_path}/**/a.txt", "[!x]*.txt"]:
        found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (the reference)
        files = sorted({path for path in found if path.is_file()}, key=str)
        assert [Path(name) for name in names(pattern)] == files, pattern


def test_a_bracket_in_a_path_that_exists_is_no_pattern(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant("data[1]/a.txt", "data1/b.txt", "[x]*.txt", "x.txt", "c[2].txt", "deep[1]/d/e.txt")
    assert names("data[1]/*.txt") == ["data[1]/a.txt"]
    assert names("data[1]") == ["data[1]/a.txt"]
    assert names("[x]*.txt") == ["[x]*.txt"]
    assert names("c[2].txt") == ["c[2].txt"]
    assert names("deep[1]/**/*.txt") == ["deep[1]/d/e.txt"]
    assert names("data[!2]/*.txt") == ["data1/b.txt"]


def test_links_that_lead_in_a_circle_come_to_an_end(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plant("t/a.txt", "t/in/b.txt", "elsewhere/c.txt")
    for link, target in (("one", "."), ("two", "."), ("in/up", ".."), ("out", "../elsewhere")):
        Path("t", link).symlink_to(target)
    assert names("t/**/*.txt") == ["t/a.txt", "t/in/b.txt", "t/out/c.txt"]
    assert names("t/**/**/*.txt") == ["t/a.txt", "t/in/b.txt", "t/out/c.txt"]


@pytest.fixture
def pipe(tmp_path):
    """A named pipe, and who writes to it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write(content: bytes) -> Path:
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        return path

    return write


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("size", [0, 7, 300_000])
def test_a_pipe_is_read_once_and_kept(pipe, tmp_path, size) -> None:
    content = b"some text\n" * size
    path = pipe(content)
    (source,) = find_sources([str(path)], spool_dir=tmp_path / "spool")
    assert (source.path.read_bytes(), source.size) == (content, len(content))
    assert (source.name, source.kind) == (path.as_posix(), "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_with_something_packed_is_unpacked(pipe, tmp_path) -> None:
    path = pipe(gzip.compress(b"text"))
    (source,) = find_sources([str(path)], spool_dir=tmp_path / "spool")
    assert source.compression == "gz"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_that_nobody_writes_to_is_given_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "PIPE_TIMEOUT", 0.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: no program has written to this pipe"):
        find_sources([str(tmp_path / "pipe")], spool_dir=tmp_path / "spool")
    assert list((tmp_path / "spool").iterdir()) == []


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_a_device_is_no_text(name) -> None:
    with pytest.raises(UserError, match=f"{name} is a device, not a regular file"):
        find_sources([name])
