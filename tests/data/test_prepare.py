"""Preparing: any form, any number of processes, interrupted or not, gives the same shards."""

import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.index import VERIFIED_FILE, Index, read_index
from gptforge.data.prepare import job as jobs_module
from gptforge.data.prepare.pipeline import PROGRESS_DIR, prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.token_dataset import ShardDataset
from gptforge.errors import UserError
from gptforge.tokenizers import decode, from_name

MARK = "<|endoftext|>"
WORDS = ["light", "yonder", "window", "café", "日本", "it's", "1,024", "breaks", "  ", "\n", "soft"]


def some_text(seed: int, words: int = 60) -> str:
    dice = random.Random(seed)
    return " ".join(dice.choice(WORDS) for _ in range(words)).strip() + f"\nend {seed}"


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parquet(path: Path, texts: list[str], *, rows: int = 7) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows)
    return path


def made(out: Path, *names: object, **options) -> Index:
    settings = {name: options.pop(name) for name in ("workers", "overwrite") if name in options}
    form = TextFormat(
        **{name: options.pop(name) for name in ("field", "split_on") if name in options}
    )
    return prepare(out, PrepareRequest(tuple(map(str, names)), form=form, **options), **settings)


def stream(index: Index, side: str) -> list[int]:
    return ShardDataset(index.shards(side), vocab_size=10**6)[:].tolist()


def texts_of(index: Index, side: str) -> list[str]:
    whole = decode(index.load_tokenizer(), stream(index, side))
    assert not whole or whole.startswith(MARK)
    return whole.split(MARK)[1:]


def files_of(folder: Path) -> dict[str, bytes]:
    """All but the stamp, which has the times of the others."""
    there = sorted(path for path in folder.iterdir() if path.name != VERIFIED_FILE)
    return {path.name: path.read_bytes() for path in there}


MANY = [some_text(i) for i in range(120)]


def test_every_form_gives_the_same_documents(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(MANY):
        (tmp_path / "folder" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    plain = jsonl(tmp_path / "a.jsonl", MANY)
    raw = plain.read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.ndjson.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "marked.txt").write_text(f"\n{MARK}\n".join(MANY), encoding="utf-8")
    forms: dict[str, dict] = {"folder": {}, "a.jsonl": {}, "a.json.gz": {}, "a.ndjson.xz": {}}
    forms["marked.txt"] = {"split_on": MARK}
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    forms["a.jsonl.zst"] = {}
    parquet(tmp_path / "a.parquet", MANY)
    forms["a.parquet"] = {}
    shards = []
    for number, (name, options) in enumerate(forms.items()):
        index = made(tmp_path / f"out{number}", tmp_path / name, val_fraction=0.2, **options)
        assert index.record["split"]["rule"] == "hash"
        shards.append((stream(index, "train"), stream(index, "val")))
    assert all(pair == shards[0] for pair in shards)
    index = read_index(tmp_path / "out0")
    assert index is not None
    assert sorted(texts_of(index, "train") + texts_of(index, "val")) == sorted(MANY)
    assert 10 < len(texts_of(index, "val")) < 40


def test_the_number_of_processes_changes_no_byte(tmp_path) -> None:
    jsonl(tmp_path / "a.jsonl", MANY)
    parquet(tmp_path / "b.parquet", [some_text(i) for i in range(200, 260)])
    (tmp_path / "c.txt").write_text(" ".join(some_text(i) for i in range(300, 400)))
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(some_text(7).encode()))
    names = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.txt", "d.md.gz")]
    folders = []
    for workers in (1, 2, 3):
        made(tmp_path / str(workers), *names, shard_bytes=4096, workers=workers)
        folders.append(files_of(tmp_path / str(workers)))
    assert folders[0] == folders[1] == folders[2]
    assert len([name for name in folders[0] if name.startswith("train")]) > 5


def test_the_size_of_a_shard_changes_no_token(tmp_path) -> None:
    jsonl(tmp_path / "a.jsonl", MANY)
    (tmp_path / "c.txt").write_text(" ".join(some_text(i) for i in range(300, 400)))
    names = [tmp_path / "a.jsonl", tmp_path / "c.txt"]
    tokens = []
    for size in (300, 5000, 2**26):
        index = made(tmp_path / str(size), *names, shard_bytes=size)
        tokens.append((stream(index, "train"), stream(index, "val")))
        counted = sum(shard["tokens"] for shard in index.record["shards"])
        assert counted == sum(map(len, tokens[-1]))
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [100, 1000, 2**26])
@pytest.mark.parametrize("block", [50, 2**15])
def test_one_long_text_in_pieces_is_tokenized_as_a_whole(
    tmp_path, monkeypatch, ending, size, block
) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK", block)
    monkeypatch.setattr("gptforge.data.prepare.scan.STEP", 10 * block)
    text = "\n\n".join(some_text(i) + "  \n\n  x" + "-" * i * i for i in range(40))
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ending).encode())
    index = made(tmp_path / "out", tmp_path / "t.txt", shard_bytes=size, val_fraction=0.13)
    cut = int(len(text) * (1 - 0.13))
    gpt2 = from_name("gpt2", "")
    assert stream(index, "train") == gpt2.encode(text[:cut]).tolist()
    assert stream(index, "val") == gpt2.encode(text[cut:]).tolist()
    assert index.total("train", "characters") == cut
    assert index.total("val", "bytes") == len(text[cut:].encode())
    assert any("byte order mark" in notice for notice in index.record["notices"])


def test_a_long_packed_text_is_tokenized_as_a_whole(tmp_path, monkeypatch) -> None:
    text = "\n\n".join(some_text(i) for i in range(50))
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress(text.encode()))
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK", 333)
    index = made(tmp_path / "out", tmp_path / "t.txt.xz", val_fraction=0.2)
    cut = int(len(text) * 0.8)
    assert stream(index, "train") == from_name("gpt2", "").encode(text[:cut]).tolist()
    assert stream(index, "val") == from_name("gpt2", "").encode(text[cut:]).tolist()


def test_few_documents_are_cut_at_a_boundary(tmp_path) -> None:
    few = MANY[:10]
    index = made(tmp_path / "out", jsonl(tmp_path / "a.jsonl", few), val_fraction=0.3)
    assert texts_of(index, "train") + texts_of(index, "val") == few
    assert len(texts_of(index, "val")) == 3


def test_a_share_held_out_that_is_far_from_what_was_asked_is_said(tmp_path) -> None:
    said: list[str] = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(some_text(1) + name, "utf-8")
    sources = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt"))
    prepare(tmp_path / "out", PrepareRequest(sources, tokenizer="byte"), log=said.append)
    assert any("note: 50% of the text are held out, not 10%" in text for text in said)
    said.clear()
    one = jsonl(tmp_path / "many.jsonl", MANY)
    prepare(tmp_path / "many", PrepareRequest((str(one),), tokenizer="byte"), log=said.append)
    assert not any("held out" in text for text in said)


def test_more_data_moves_no_document_across(tmp_path) -> None:
    first = made(tmp_path / "1", jsonl(tmp_path / "a.jsonl", MANY), val_fraction=0.1)
    more = jsonl(tmp_path / "b.jsonl", [some_text(i) for i in range(1000, 1100)])
    second = made(tmp_path / "2", tmp_path / "a.jsonl", more, val_fraction=0.1)
    for side in ("train", "val"):
        assert set(texts_of(first, side)) <= set(texts_of(second, side))


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    whole = made(tmp_path / "whole", source, shard_bytes=3000)
    real, ran = jobs_module.JobRunner.run, []

    def run(self, job):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(job.number)
        return real(self, job)

    monkeypatch.setattr(jobs_module.JobRunner, "run", run)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", source, shard_bytes=3000, workers=1)
    assert read_index(tmp_path / "cut") is None
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.bin")}
    assert stamps
    ran.clear()

    def run_on(self, job):
        ran.append(job.number)
        return real(self, job)

    monkeypatch.setattr(jobs_module.JobRunner, "run", run_on)
    made(tmp_path / "cut", source, shard_bytes=3000, workers=1)
    jobs = {shard["file"].split("_")[1] for shard in whole.record["shards"]}
    assert len(ran) == len(jobs) - 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_shard_that_was_lost_meanwhile_is_made_again(tmp_path, monkeypatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    whole = made(tmp_path / "whole", source, shard_bytes=3000)
    monkeypatch.setattr("gptforge.data.prepare.finalize.write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "cut", source, shard_bytes=3000, workers=1)
    monkeypatch.undo()
    (tmp_path / "cut" / "train_000002.bin").write_bytes(b"half")
    (tmp_path / "cut" / ".train_000003.partial.bin").write_bytes(b"left by a crash")
    made(tmp_path / "cut", source, shard_bytes=3000)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert whole.digest


def test_the_same_request_on_a_finished_folder_does_nothing(tmp_path) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    made(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    said: list[str] = []
    prepare(tmp_path / "out", PrepareRequest((str(source),)), log=said.append)
    assert said == [f"{(tmp_path / 'out').as_posix()} is prepared already"]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_another_request_never_takes_what_lies_in_a_folder(tmp_path) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    made(tmp_path / "out", source)
    with pytest.raises(UserError, match="--overwrite"):
        made(tmp_path / "out", source, tokenizer="byte")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        made(tmp_path / "mine", source)
    made(tmp_path / "out", source, tokenizer="byte", overwrite=True)
    old = read_index(tmp_path / "out.old-1")
    assert old is not None and old.load_tokenizer().name == "gpt2"


def test_overwriting_does_not_move_the_sources_away(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = jsonl(out / "d.jsonl", [some_text(i) for i in range(5)])
    for name in (source, out / "*.jsonl", tmp_path / "ou?" / "*.jsonl", out):
        with pytest.raises(UserError, match=r"would move .*out aside with"):
            made(out, name, tokenizer="byte", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "d.jsonl"]


def test_an_unfinished_folder_starts_anew_when_the_data_changed(tmp_path, monkeypatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    monkeypatch.setattr("gptforge.data.prepare.finalize.write_index", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path / "out", source, shard_bytes=3000)
    monkeypatch.undo()
    jsonl(source, MANY[:101])
    made(tmp_path / "out", source, shard_bytes=10**6)
    made(tmp_path / "fresh", source, shard_bytes=10**6)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_nanogpts_form_is_one_file_a_side_without_a_header(tmp_path) -> None:
    source = jsonl(tmp_path / "a.jsonl", MANY)
    usual = made(tmp_path / "usual", source, shard_bytes=3000)
    bare = made(tmp_path / "bare", source, shard_bytes=3000, headerless=True)
    for side in ("train", "val"):
        ids = np.fromfile(tmp_path / "bare" / f"{side}.bin", dtype=np.uint16)
        assert ids.tolist() == stream(usual, side) == stream(bare, side)
    assert len(list((tmp_path / "bare").glob("*.bin"))) == 2
    assert not (tmp_path / "bare" / PROGRESS_DIR).exists()


def test_standard_input_is_a_text_like_any_other(tmp_path, monkeypatch) -> None:
    text = some_text(1, words=500)
    for number, raw in enumerate((text.encode(), gzip.compress(text.encode()))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        index = made(tmp_path / str(number), "-")
        cut = int(len(text) * 0.9)
        assert stream(index, "train") == from_name("gpt2", "").encode(text[:cut]).tolist()
        assert index.record["sources"][0]["path"] == "standard input"


def test_files_are_found_by_name_folder_and_pattern_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.md", "b/1.txt", "b/c/3.txt.gz", "b/skip.png", "b/.hidden.txt", "z.log"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = name.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    index = made(Path("out"), "z.log", "b", val_fraction=0.0)
    assert texts_of(index, "train") == ["z.log", "b/1.txt", "b/2.md", "b/c/3.txt.gz"]
    index = made(Path("out2"), "b/*.md", "b/**/*.gz", val_fraction=0.0)
    assert texts_of(index, "train") == ["b/2.md", "b/c/3.txt.gz"]
    with pytest.raises(UserError, match="named twice"):
        made(Path("out3"), "b", "b/1.txt")


def test_shards_are_not_prepared_again(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("to be or not to be")
    made(Path("shards"), "t.txt")
    with pytest.raises(UserError, match="shards holds shards, prepared already: train on them"):
        made(Path("again"), "shards")
    # Where they lie among texts, the texts alone are read.
    index = made(Path("again"), ".", val_fraction=0.0)
    assert [source["path"] for source in index.record["sources"]] == ["t.txt"]


def test_the_index_says_what_there_is(tmp_path) -> None:
    index = made(tmp_path / "out", jsonl(tmp_path / "a.jsonl", MANY, field="body"), field="body")
    record = index.record
    assert record["tokenizer"]["name"] == "gpt2"
    assert record["tokenizer"]["end_of_text"] == 50256
    assert sum(index.total(side, "documents") for side in ("train", "val")) == 120
    texts = "".join(MANY)
    assert sum(index.total(side, "characters") for side in ("train", "val")) == len(texts)
    assert sum(index.total(side, "bytes") for side in ("train", "val")) == len(texts.encode())
    import hashlib

    for shard in record["shards"]:
        raw = (tmp_path / "out" / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{}",
        '{"format": "gptforge-shards", "version": 2}',
        '{"format": "gptforge-shards", "version": 1, "split": {"fraction": 0.1}, "shards": '
        '[{"file": "../../etc/passwd", "split": "train", "tokens": 1}]}',
        '{"format": "gptforge-shards", "version": 1, "split": {"fraction": 0.1}, "shards": '
        '[{"file": "a.bin", "split": "train", "tokens": -1}]}',
        "[" * 100_000,
    ],
)
def test_a_strange_index_is_refused(tmp_path, broken) -> None:
    (tmp_path / "index.json").write_text(broken)
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable index"):
        read_index(tmp_path)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_preparation_that_was_killed_leaves_nobody_behind_and_goes_on(tmp_path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [some_text(i, words=2000) for i in range(400)])
    command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--out"]
    options = ["--workers", "2", "--tokenizer", "byte"]
    killed = subprocess.Popen(
        [*command, str(tmp_path / "cut"), *options, "--shard_mb", "1"], stderr=subprocess.DEVNULL
    )
    notes = tmp_path / "cut" / PROGRESS_DIR
    while not list(notes.glob("job-*.json")) and killed.poll() is None:
        time.sleep(0.01)
    crew = children(killed.pid)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, crew)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, crew))
    for folder in ("cut", "whole"):
        done = subprocess.run(
            [*command, str(tmp_path / folder), *options, "--shard_mb", "1"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_an_index_of_another_program_does_not_make_shards_of_texts(tmp_path) -> None:
    (tmp_path / "index.json").write_text('{"pages": []}')
    assert read_index(tmp_path) is None
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable index"):
        read_index(tmp_path)
