"""Any form, any number of processes, interrupted or not, gives the same shards."""

import gzip
import hashlib
import io
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.prepare.job import JobResult, JobRunner
from gptforge.data.prepare.pipeline import PROGRESS_DIR, prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.shard_index import read_index
from gptforge.errors import UserError
from gptforge.tokenizers import from_name
from gptforge.tokenizers.gpt2 import GPT2Tokenizer
from tests.data.prepare.small_datasets import (
    DOCUMENTS,
    EOT,
    files_of,
    prepare_files,
    some_text,
    texts_of,
    tokens_of,
    write_jsonl,
    write_parquet,
)
from tests.environment import python_path


def test_formats_give_same_documents(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    for number, text in enumerate(DOCUMENTS):
        (tmp_path / "folder" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    raw = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS).read_bytes()
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.ndjson.xz").write_bytes(lzma.compress(raw))
    (tmp_path / "delimited.txt").write_text(f"\n{EOT}\n".join(DOCUMENTS), encoding="utf-8")
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    names = ["folder", "a.jsonl", "a.json.gz", "a.ndjson.xz", "a.jsonl.zst", "a.parquet"]
    forms: dict[str, dict] = {name: {} for name in names} | {"delimited.txt": {"split_on": EOT}}
    tokens = []
    for number, (name, options) in enumerate(forms.items()):
        index = prepare_files(
            tmp_path / f"out{number}", tmp_path / name, val_fraction=0.2, **options
        )
        assert index.record["split"]["rule"] == "hash"
        tokens.append((tokens_of(index, "train"), tokens_of(index, "val")))
    assert all(pair == tokens[0] for pair in tokens)
    index = read_index(tmp_path / "out0")
    assert index is not None
    assert sorted(texts_of(index, "train") + texts_of(index, "val")) == sorted(DOCUMENTS)
    assert 10 < len(texts_of(index, "val")) < 40


def test_num_workers_changes_no_byte(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    write_parquet(tmp_path / "b.parquet", [some_text(i) for i in range(200, 260)])
    (tmp_path / "c.txt").write_text(" ".join(some_text(i) for i in range(300, 400)))
    (tmp_path / "d.md.gz").write_bytes(gzip.compress(some_text(7).encode()))
    names = [tmp_path / name for name in ("a.jsonl", "b.parquet", "c.txt", "d.md.gz")]
    folders = []
    for workers in (1, 3):
        prepare_files(tmp_path / str(workers), *names, shard_bytes=4096, num_workers=workers)
        folders.append(files_of(tmp_path / str(workers)))
    assert folders[0] == folders[1]
    assert len([name for name in folders[0] if name.startswith("train")]) > 5


def test_shard_bytes_changes_no_token(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gptforge.data.prepare.partition.SEARCH_BLOCK", 16)
    write_jsonl(tmp_path / "a.jsonl", [some_text(i, words=10) for i in range(120)])
    (tmp_path / "c.txt").write_text(" ".join(some_text(i, words=10) for i in range(300, 400)))
    names = [tmp_path / "a.jsonl", tmp_path / "c.txt"]
    tokens = []
    for size in (100, 1000, 2**26):
        index = prepare_files(tmp_path / str(size), *names, shard_bytes=size)
        tokens.append((tokens_of(index, "train"), tokens_of(index, "val")))
        counted = sum(shard["tokens"] for shard in index.record["shards"])
        assert counted == sum(map(len, tokens[-1]))
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [100, 1000, 2**26])
@pytest.mark.parametrize("block", [50, 2**15])
def test_long_text_in_parts_has_the_same_ids(tmp_path, monkeypatch, newline, size, block) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK_BYTES", block)
    monkeypatch.setattr("gptforge.data.prepare.text_io.OFFSET_STRIDE", 10 * block)
    text = "\n\n".join(some_text(i) + "  \n\n  x" + "-" * i * i for i in range(40))
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", newline).encode())
    index = prepare_files(tmp_path / "out", tmp_path / "t.txt", shard_bytes=size, val_fraction=0.13)
    cut = int(len(text) * (1 - 0.13))
    gpt2 = from_name("gpt2", "")
    assert tokens_of(index, "train") == gpt2.encode(text[:cut]).tolist()
    assert tokens_of(index, "val") == gpt2.encode(text[cut:]).tolist()
    assert index.total("train", "characters") == cut
    assert index.total("val", "bytes") == len(text[cut:].encode())
    assert any("byte order mark" in notice for notice in index.record["notices"])


def test_long_compressed_text_has_the_same_ids(tmp_path, monkeypatch) -> None:
    text = "\n\n".join(some_text(i) for i in range(50))
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress(text.encode()))
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK_BYTES", 333)
    index = prepare_files(tmp_path / "out", tmp_path / "t.txt.xz", val_fraction=0.2)
    cut = int(len(text) * 0.8)
    assert tokens_of(index, "train") == from_name("gpt2", "").encode(text[:cut]).tolist()
    assert tokens_of(index, "val") == from_name("gpt2", "").encode(text[cut:]).tolist()


def test_few_documents_are_split_at_a_boundary(tmp_path) -> None:
    few = DOCUMENTS[:10]
    path = write_jsonl(tmp_path / "a.jsonl", few)
    index = prepare_files(tmp_path / "out", path, val_fraction=0.3)
    assert texts_of(index, "train") + texts_of(index, "val") == few
    assert len(texts_of(index, "val")) == 3


def test_held_out_share_far_from_request_is_logged(tmp_path, messages) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(some_text(1) + name, "utf-8")
    names = tuple(str(tmp_path / name) for name in ("a.txt", "b.txt"))
    prepare(tmp_path / "out", PrepareRequest(names, tokenizer="byte"))
    assert any("note: 50% of the text is held out, not 10%" in line for line in messages)
    messages.clear()
    path = write_jsonl(tmp_path / "many.jsonl", DOCUMENTS)
    prepare(tmp_path / "many", PrepareRequest((str(path),), tokenizer="byte"))
    assert not any("held out" in line for line in messages)


def test_more_data_moves_no_document_to_the_other_split(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    first = prepare_files(tmp_path / "1", path, val_fraction=0.1)
    more = write_jsonl(tmp_path / "b.jsonl", [some_text(i) for i in range(1000, 1100)])
    second = prepare_files(tmp_path / "2", path, more, val_fraction=0.1)
    for split in ("train", "val"):
        assert set(texts_of(first, split)) <= set(texts_of(second, split))


def test_finished_jobs_are_not_run_again(tmp_path, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    complete = prepare_files(tmp_path / "complete", source, shard_bytes=3000)
    run, started = JobRunner.run, []

    def run_four(self, job, progress):
        if len(started) == 4:
            raise KeyboardInterrupt
        started.append(job.index)
        return run(self, job, progress)

    monkeypatch.setattr(JobRunner, "run", run_four)
    with pytest.raises(KeyboardInterrupt):
        prepare_files(tmp_path / "cut", source, shard_bytes=3000, num_workers=1)
    assert read_index(tmp_path / "cut") is None
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.bin")}
    assert times
    started.clear()

    def run_all(self, job, progress):
        started.append(job.index)
        return run(self, job, progress)

    monkeypatch.setattr(JobRunner, "run", run_all)
    prepare_files(tmp_path / "cut", source, shard_bytes=3000, num_workers=1)
    jobs = {shard["file"].split("_")[1] for shard in complete.record["shards"]}
    assert len(started) == len(jobs) - 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "complete")


def test_job_result_of_version_0_1_is_read() -> None:
    record = JobResult(splits={3: ["val"]}, num_eot_literals=2).to_json()
    assert (record["sides"], record["marks"]) == ({3: ["val"]}, 2)
    assert JobResult.from_json(record | {"sides": {"3": ["val"]}}).splits == {3: ["val"]}


def interrupt_before_index(monkeypatch) -> None:
    monkeypatch.setattr("gptforge.data.prepare.finalize.write_index", lambda *_: 1 / 0)


def test_shard_lost_meanwhile_is_written_again(tmp_path, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    prepare_files(tmp_path / "complete", source, shard_bytes=3000)
    interrupt_before_index(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        prepare_files(tmp_path / "cut", source, shard_bytes=3000, num_workers=1)
    monkeypatch.undo()
    (tmp_path / "cut" / "train_000002.bin").write_bytes(b"half")
    (tmp_path / "cut" / ".train_000003.partial.bin").write_bytes(b"left by a crash")
    prepare_files(tmp_path / "cut", source, shard_bytes=3000)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "complete")


def test_jobs_of_another_tokenizer_are_run_again(tmp_path, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    interrupt_before_index(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        prepare_files(tmp_path / "cut", source, shard_bytes=3000, tokenizer="bpe", vocab_size=300)
    monkeypatch.undo()
    other = GPT2Tokenizer(["a b", "c d"])  # as of a version that learns differently
    monkeypatch.setattr("gptforge.data.prepare.pipeline.learn_bpe", lambda *_: other)
    for out in ("cut", "fresh"):
        prepare_files(tmp_path / out, source, shard_bytes=3000, tokenizer="bpe", vocab_size=300)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "fresh")


def test_unfinished_folder_starts_from_scratch_if_data_changed(tmp_path, monkeypatch) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    interrupt_before_index(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        prepare_files(tmp_path / "out", source, shard_bytes=3000)
    monkeypatch.undo()
    write_jsonl(source, DOCUMENTS[:101])
    prepare_files(tmp_path / "out", source, shard_bytes=10**6)
    prepare_files(tmp_path / "fresh", source, shard_bytes=10**6)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_same_request_on_finished_folder_does_nothing(tmp_path, messages) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / "out"
    prepare_files(out, source)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare(out, PrepareRequest((str(source),)))
    assert messages == [f"{out.as_posix()} is prepared already"]
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}


def test_folder_with_other_content_is_refused(tmp_path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    prepare_files(tmp_path / "out", source)
    with pytest.raises(UserError, match="--restart"):
        prepare_files(tmp_path / "out", source, tokenizer="byte")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        prepare_files(tmp_path / "mine", source)
    prepare_files(tmp_path / "out", source, tokenizer="byte", restart=True)
    old = read_index(tmp_path / "out.old-1")
    assert old is not None and old.load_tokenizer().name == "gpt2"


def test_restart_does_not_move_the_sources(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = write_jsonl(out / "d.jsonl", [some_text(i) for i in range(5)])
    for name in (source, out / "*.jsonl", tmp_path / "ou?" / "*.jsonl", out):
        with pytest.raises(UserError, match=r"would move .*out away with"):
            prepare_files(out, name, tokenizer="byte", restart=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "d.jsonl"]


def test_raw_bin_is_one_file_per_split_without_header(tmp_path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    shards = prepare_files(tmp_path / "shards", source, shard_bytes=3000)
    raw = prepare_files(tmp_path / "raw", source, shard_bytes=3000, raw_bin=True)
    for split in ("train", "val"):
        ids = np.fromfile(tmp_path / "raw" / f"{split}.bin", dtype=np.uint16)
        assert ids.tolist() == tokens_of(shards, split) == tokens_of(raw, split)
    assert len(list((tmp_path / "raw").glob("*.bin"))) == 2
    assert not (tmp_path / "raw" / PROGRESS_DIR).exists()


def test_standard_input_is_read(tmp_path, monkeypatch) -> None:
    text = some_text(1, words=500)
    for number, raw in enumerate((text.encode(), gzip.compress(text.encode()))):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        index = prepare_files(tmp_path / str(number), "-")
        cut = int(len(text) * 0.9)
        assert tokens_of(index, "train") == from_name("gpt2", "").encode(text[:cut]).tolist()
        assert index.record["sources"][0]["path"] == "standard input"


def test_files_folders_and_patterns_are_read_in_order(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.md", "b/1.txt", "b/c/3.txt.gz", "b/skip.png", "b/.hidden.txt", "z.log"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = name.encode()
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    index = prepare_files(Path("out"), "z.log", "b", val_fraction=0.0)
    assert texts_of(index, "train") == ["z.log", "b/1.txt", "b/2.md", "b/c/3.txt.gz"]
    index = prepare_files(Path("out2"), "b/*.md", "b/**/*.gz", val_fraction=0.0)
    assert texts_of(index, "train") == ["b/2.md", "b/c/3.txt.gz"]
    with pytest.raises(UserError, match="named twice"):
        prepare_files(Path("out3"), "b", "b/1.txt")


def test_shards_are_not_prepared_again(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("to be or not to be")
    prepare_files(Path("shards"), "t.txt")
    with pytest.raises(UserError, match="shards holds shards, prepared already: train on them"):
        prepare_files(Path("again"), "shards")
    # If they are among texts, only the texts are read.
    index = prepare_files(Path("again"), ".", val_fraction=0.0)
    assert [source["path"] for source in index.record["sources"]] == ["t.txt"]


def test_index_describes_the_data(tmp_path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS, field="body")
    index = prepare_files(tmp_path / "out", path, field="body")
    record, text = index.record, "".join(DOCUMENTS)
    assert record["tokenizer"]["name"] == "gpt2"
    assert record["tokenizer"]["end_of_text"] == 50256
    totals = {"documents": 120, "characters": len(text), "bytes": len(text.encode())}
    for quantity, total in totals.items():
        assert sum(index.total(split, quantity) for split in ("train", "val")) == total
    for shard in record["shards"]:
        raw = (tmp_path / "out" / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]


def read_proc(path: Path) -> str:
    """The text of a file in /proc; nothing if its process or thread has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in read_proc(task).split()]


def is_running(pid: int) -> bool:
    state = read_proc(Path(f"/proc/{pid}/stat")).rpartition(") ")[2][:1]
    return state not in ("", "Z")


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_preparation_leaves_no_process_and_resumes(tmp_path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [some_text(i, words=2000) for i in range(400)])
    command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--shard_mb", "1"]
    command += ["--workers", "2", "--tokenizer", "byte", "--out"]
    killed = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
    progress_dir = tmp_path / "cut" / PROGRESS_DIR
    while not list(progress_dir.glob("job-*.json")) and killed.poll() is None:
        time.sleep(0.01)
    workers = children(killed.pid)
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
    for folder in ("cut", "complete"):
        done = subprocess.run(
            [*command, str(tmp_path / folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "complete")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal masks")
def test_interrupt_does_not_reach_workers_that_are_starting(tmp_path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [some_text(i, words=2000) for i in range(200)])
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'spawn_main' in ' '.join(sys.orig_argv):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--shard_mb", "1"]
    command += ["--workers", "2", "--tokenizer", "byte", "--out", str(tmp_path / "shards")]
    env = {**os.environ, "PYTHONPATH": python_path(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
