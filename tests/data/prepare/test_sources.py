"""Which files a name stands for."""

import glob
import gzip
import os
import sys
import threading
from pathlib import Path

import pytest

from gptforge.data.prepare import sources
from gptforge.data.prepare.sources import find_sources
from gptforge.data.shard_index import read_index
from gptforge.errors import UserError
from tests.data.prepare.small_datasets import prepare_files

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def find(pattern: str) -> list[str]:
    return [source.name for source in find_sources([pattern])]


def create(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text\n")


def test_folder_skips_hidden_files_runs_and_json() -> None:
    texts = ["a.txt", "b.text", "c/d.markdown", "c/e.ndjson", "checkpoints/f.MD"]
    others = ["package.json", "c/index.json", ".git/g.txt", "runs/x/log.md", "runs/x/config.toml",
              "runs/x/metrics.jsonl", "runs/x/checkpoints/last/config.json",
              "runs/y/log.md", "runs/y/config.toml", "runs/y/metrics.jsonl"]  # fmt: skip
    create(*(f"texts/{name}" for name in texts + others))
    assert find("texts") == [f"texts/{name}" for name in texts]


@pytest.mark.parametrize("name", ["a.json", "*.json"])
def test_explicit_json_is_read(name) -> None:
    create("a.json")
    assert [source.kind for source in find_sources([name])] == ["jsonl"]


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        (["run/config.toml", "run/checkpoints/last"], "run", "--init_from run starts from"),
        (["m/config.json", "m/model.safetensors", "m/README.md"], "m", "--init_from m starts from"),
        ([], "https://example.com/text.txt", "URLs are not supported"),
    ],
)
def test_runs_models_and_urls_are_refused(files, name, words) -> None:
    create(*files)
    with pytest.raises(UserError, match=words):
        find_sources([name])


def test_patterns_match_like_glob(tmp_path) -> None:
    create(
        "a.txt", "b.md", ".h.txt", "x/a.txt", "x/y/z/a.txt", "x/.h/a.txt", ".g/a.txt", "x1/b.txt"
    )
    patterns = ["*.txt", "**/*.txt", "x/**/*.txt", "**", "x/**", "?/a.txt", "x[0-9]/*", ".*.txt"]
    for pattern in [*patterns, "**/y/**/*.txt", "*/*.txt", f"{tmp_path}/**/a.txt", "[!x]*.txt"]:
        found = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 (the reference)
        files = sorted({path for path in found if path.is_file()}, key=str)
        assert [Path(name) for name in find(pattern)] == files, pattern


def test_bracket_in_an_existing_path_is_literal() -> None:
    create("data[1]/a.txt", "data1/b.txt", "[x]*.txt", "x.txt", "c[2].txt", "deep[1]/d/e.txt")
    assert find("data[1]/*.txt") == ["data[1]/a.txt"]
    assert find("data[1]") == ["data[1]/a.txt"]
    assert find("[x]*.txt") == ["[x]*.txt"]
    assert find("c[2].txt") == ["c[2].txt"]
    assert find("deep[1]/**/*.txt") == ["deep[1]/d/e.txt"]
    assert find("data[!2]/*.txt") == ["data1/b.txt"]


def test_circular_links() -> None:
    create("t/a.txt", "t/in/b.txt", "elsewhere/c.txt")
    for link, target in (("one", "."), ("two", "."), ("in/up", ".."), ("out", "../elsewhere")):
        Path("t", link).symlink_to(target)
    assert find("t/**/*.txt") == ["t/a.txt", "t/in/b.txt", "t/out/c.txt"]
    assert find("t/**/**/*.txt") == ["t/a.txt", "t/in/b.txt", "t/out/c.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_name_that_is_not_utf8_is_escaped() -> None:
    Path("texts").mkdir()
    name = os.fsdecode(b"caf\xe9\n.jsonl")
    Path("texts", name).write_text('{"text": "some words"}\nbad line\n{"text": "more words"}')
    index = prepare_files(Path("out"), "texts", skip_bad=True)
    assert index.record["sources"][0]["path"] == r"texts/caf\udce9 .jsonl"
    assert read_index(Path("out")).total("train", "documents") == 1


def test_broken_link_and_empty_name_are_refused() -> None:
    Path("gone.txt").symlink_to("nothing")
    Path("loop.txt").symlink_to("loop.txt")
    for name in ("gone.txt", "loop.txt"):
        with pytest.raises(UserError, match=f"{name}: a broken link"):
            find_sources([name])
    with pytest.raises(UserError, match="an empty name"):
        find_sources([""])  # as of a shell variable that is not set


@pytest.fixture
def write_pipe():
    """Writes bytes to a named pipe in the background, and returns its path."""
    path = Path("pipe")
    os.mkfifo(path)

    def write(content: bytes) -> Path:
        threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
        return path

    return write


@needs_pipes
@pytest.mark.parametrize("size", [0, 7, 300_000])
def test_pipe_is_spooled(write_pipe, size) -> None:
    content = b"some text\n" * size
    path = write_pipe(content)
    (source,) = find_sources([str(path)], spool_dir=Path("spool"))
    assert (source.path.read_bytes(), source.size) == (content, len(content))
    assert (source.name, source.kind) == (path.as_posix(), "text")


@needs_pipes
def test_compressed_pipe(write_pipe) -> None:
    path = write_pipe(gzip.compress(b"text"))
    (source,) = find_sources([str(path)], spool_dir=Path("spool"))
    assert source.compression == "gz"


@needs_pipes
def test_pipe_without_a_writer(monkeypatch) -> None:
    monkeypatch.setattr(sources, "PIPE_TIMEOUT", 0.0)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe: no program has written to this pipe"):
        find_sources(["pipe"], spool_dir=Path("spool"))
    assert list(Path("spool").iterdir()) == []


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null"])
def test_device_is_refused(name) -> None:
    with pytest.raises(UserError, match=f"{name} is a device, not a regular file"):
        find_sources([name])
