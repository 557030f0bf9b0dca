"""Preparing data: speed beside nanoGPT's way, memory at two sizes, and what the loader costs.

    pip install -e '.[data]' datasets
    python benchmarks/prepare_speed.py                       all of it, about ten minutes on 2 cores
    python benchmarks/prepare_speed.py --parts speed         one part: speed, memory, loader
    python benchmarks/prepare_speed.py --megabytes 50        less text for the comparison

The text is what this machine has: sources and documents of Python and its packages, as JSON lines;
a gigabyte takes several copies of them. All of it lies in a temporary folder and is deleted.

- speed: `gptforge prepare` from the command to the index, reading, splitting, hashing and writing
  included, against tiktoken's `encode_ordinary` on each document in a `datasets.map` and the copy
  into one memory-mapped file, as nanoGPT's prepare.py does it (the loading of the data set is not
  counted against it). One process each, then all cores. The text is not repeated.
- memory: the most that all processes of a preparation take together (their proportional shares),
  at 100 MB and 1 GB, as one text and as JSON lines.
- loader: time spent waiting for batches while another 131,072 tokens are learned every 262 ms, that
  is at 500,000 a second; private memory over 100,000 batches.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = {".py", ".txt", ".md", ".rst", ".h", ".hpp", ".pyi", ".js", ".css", ".html"}
MEGA = 10**6
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="speed,memory,loader")
    parser.add_argument("--megabytes", type=int, default=100, help="text for the comparison")
    parser.add_argument("--large", type=int, default=1000, help="megabytes of the larger text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--forms", default="txt,jsonl", help="of the text for memory")
    parser.add_argument("--folder", help="where to build the text; a temporary one by default")
    args = parser.parse_args()
    print(
        f"{CORES} cores, {platform.processor() or platform.machine()}, {_cpu()}, Python "
        f"{platform.python_version()}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        here = Path(folder)
        parts = args.parts.split(",")
        if "speed" in parts:
            speed(here, args.megabytes, args.turns)
        if "memory" in parts:
            memory(here, (args.large // 10, args.large), args.forms.split(","))
        if "loader" in parts:
            loader(here, args.large, args.batches)


def documents() -> Iterator[str]:
    """Readable files of this Python and its packages, each once."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    yield (ROOT / "input.txt").read_text(encoding="utf-8")
    seen = set()
    for root in sorted(roots):
        for path in sorted(root.rglob("*")):
            if path.suffix not in ENDINGS or not path.is_file() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip() and "\0" not in text:
                yield text


def build(path: Path, megabytes: int) -> int:
    """So much text as JSON lines, or as one text; returns its bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * MEGA:
            before = written
            for text in documents():
                as_line = json.dumps({"text": text}) if path.suffix == ".jsonl" else text
                file.write(as_line + "\n")
                written += len(text.encode("utf-8"))
                if written >= megabytes * MEGA:
                    break
            assert written > before
    return written


def speed(here: Path, megabytes: int, turns: int) -> None:
    source = here / "text.jsonl"
    n_bytes = build(source, megabytes)
    with source.open(encoding="utf-8") as file:
        count = sum(1 for _ in file)
    print(
        f"\n{n_bytes / MEGA:.0f} MB of text, {count:,} documents, of which none is repeated"
        if n_bytes < sum(len(t.encode()) for t in documents())
        else "\nwith repetitions"
    )
    ways = {
        "ours": lambda n: ours(source, here / "ours", n, fast=True),
        "ours, without gigatoken": lambda n: ours(source, here / "ours", n, fast=False),
        "nanoGPT's way": lambda n: theirs(source, here / "theirs", n),
    }
    print("\n| processes | who | MB/s, median of turns (from, to) | MB a second of CPU time |")
    print("| --- | --- | --- | --- |")
    for processes in sorted({1, CORES}):
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in ways}
        for _ in range(turns):
            for who, way in ways.items():
                times[who].append(way(processes))
        walls = {who: sorted(n_bytes / MEGA / wall for wall, _ in t) for who, t in times.items()}
        cpus = {who: sorted(n_bytes / MEGA / cpu for _, cpu in t) for who, t in times.items()}
        for who in ways:
            wall, cpu = walls[who][turns // 2], cpus[who][turns // 2]
            wins = walls["ours"][turns // 2] / wall, cpus["ours"][turns // 2] / cpu
            print(
                f"| {processes} | {who} | {wall:.1f} ({walls[who][0]:.1f}, {walls[who][-1]:.1f}), "
                f"ours {wins[0]:.1f} x | {cpu:.1f}, ours {wins[1]:.1f} x |",
                flush=True,
            )
    ids = {name: np.fromfile(here / name / "train.bin", np.uint16) for name in ("ours", "theirs")}
    print(f"\nthe same {len(ids['ours']):,} tokens: {np.array_equal(ids['ours'], ids['theirs'])}")


def ours(source: Path, out: Path, processes: int, *, fast: bool) -> tuple[float, float]:
    """Seconds on the wall and of all CPUs, from the command to its end."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--out", str(out)]
    command += ["--val_fraction", "0", "--workers", str(processes), "--headerless", "true"]
    command += ["--shard_mb", "16"]
    environment = dict(os.environ)
    if not fast:
        # A package of that name that has nothing in it.
        blank = out.parent / "without" / "gigatoken"
        blank.mkdir(parents=True, exist_ok=True)
        (blank / "__init__.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = f"{blank.parent}:{environment.get('PYTHONPATH', '')}"
    begin, cpu = time.perf_counter(), _cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - begin, _cpu_seconds(resource.RUSAGE_CHILDREN) - cpu


def _cpu_seconds(*whose: int) -> float:
    used = [resource.getrusage(who) for who in whose]
    return sum(one.ru_utime + one.ru_stime for one in used)


def theirs(source: Path, out: Path, processes: int) -> tuple[float, float]:
    """As nanoGPT's prepare.py goes about it, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--folder", str(out)]
    environment = {**os.environ, "PREPARE_SPEED_PEER": f"{source}:{processes}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall, cpu = done.stdout.splitlines()[-1].split()
    return float(wall), float(cpu)


def peer() -> None:
    """The other side of the comparison: prints its seconds."""
    import datasets

    from gptforge.tokenizers.gpt2 import GPT2Tokenizer

    source, processes = os.environ["PREPARE_SPEED_PEER"].rsplit(":", 1)
    out = Path(sys.argv[-1])
    datasets.disable_progress_bars()
    data = datasets.load_dataset(
        "json", data_files=source, split="train", cache_dir=str(out / "cache")
    )
    encoding = GPT2Tokenizer().encoding
    mark = encoding.eot_token

    def process(example: dict[str, str]) -> dict[str, object]:
        # Ours puts the mark in front of a document; it costs the same.
        ids = [mark, *encoding.encode_ordinary(example["text"])]
        return {"ids": ids, "len": len(ids)}

    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    begin, cpu = time.perf_counter(), _cpu_seconds(*both)
    tokenized = data.map(process, remove_columns=["text"], num_proc=int(processes))
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    whole = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    at, batches = 0, min(1024, len(tokenized))
    for number in range(batches):
        batch = tokenized.shard(num_shards=batches, index=number, contiguous=True)
        ids = np.concatenate(batch.with_format("numpy")["ids"])
        whole[at : at + len(ids)] = ids
        at += len(ids)
    whole.flush()
    print(time.perf_counter() - begin, _cpu_seconds(*both) - cpu)


def memory(here: Path, sizes: tuple[int, int], forms: list[str]) -> None:
    print("\n| text | MB | processes | MB/s | most memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    for suffix, form in ((".txt", "one text"), (".jsonl", "JSON lines")):
        if suffix[1:] not in forms:
            continue
        for megabytes in sizes:
            source = here / f"large{suffix}"
            n_bytes = build(source, megabytes)
            out = here / f"shards{suffix}"
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--out", str(out)]
            begin = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            peak = 0
            while child.poll() is None:
                peak = max(peak, sum(_share(pid) for pid in _family(child.pid)))
                time.sleep(0.05)
            assert child.returncode == 0
            rate = n_bytes / MEGA / (time.perf_counter() - begin)
            print(
                f"| {form} | {n_bytes / MEGA:.0f} | {CORES} | {rate:.1f} | {peak / MEGA:.0f} |",
                flush=True,
            )
            source.unlink()


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in tasks.read_text().split()]
            except OSError:
                continue
    return found


def _share(pid: int) -> int:
    """Bytes of a process: its own, and its part of what it shares with others."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def loader(here: Path, megabytes: int, batches: int) -> None:
    import torch

    from gptforge.data.dataloader import DataLoader
    from gptforge.data.index import read_index
    from gptforge.data.token_dataset import ShardDataset

    torch.set_num_threads(1)
    out = here / "shards.jsonl"
    if not out.exists():
        build(here / "large.jsonl", megabytes)
        ours(here / "large.jsonl", out, CORES, fast=True)
    index = read_index(out)
    assert index is not None
    tokens = ShardDataset(index.shards("train"), vocab_size=index.load_tokenizer().vocab_size)
    options = {"context_length": 1024, "seed": 1, "shuffle": True, "device": torch.device("cpu")}
    print(f"\n{len(tokens):,} tokens in {len(tokens.shards)} shards")
    batch, rate, steps = 128, 500_000, 100
    step_time = batch * 1024 / rate
    stream = DataLoader(tokens, global_batch_size=batch, **options)
    stream.next_batch()
    waited = []
    for _ in range(steps):
        time.sleep(step_time)  # a GPU at work: the host waits for it
        begin = time.perf_counter()
        stream.next_batch()
        waited.append(time.perf_counter() - begin)
    share = sum(waited) / (steps * step_time)
    print(
        f"waiting, at {rate:,} tokens a second: {share:.3%} of the time "
        f"({1e3 * sum(waited) / steps:.2f} ms a step of {1e3 * step_time:.0f}, at most "
        f"{1e3 * max(waited):.2f})"
    )
    stream = DataLoader(tokens, global_batch_size=32, **options)
    begin = time.perf_counter()
    print("\n| batches of 32 x 1024 | private memory, MB | mapped files, MB |")
    print("| --- | --- | --- |")
    for number in range(1, batches + 1):
        stream.next_batch()
        if number in (100, batches // 100, batches // 10, batches // 2, batches):
            private, mapped = (_status(name) / MEGA for name in ("RssAnon", "RssFile"))
            print(f"| {number:,} | {private:.1f} | {mapped:.1f} |", flush=True)
    seconds = time.perf_counter() - begin
    flags = ["--preset", "debug", "--max_steps", "20", "--out_dir", str(here / "run")]
    command = [sys.executable, "-m", "gptforge", "--input", str(out), *flags]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith(("text:", "Best"))]
    print(
        "\ntrained on it, 20 updates of a tiny model, in "
        f"{time.perf_counter() - start:.0f} s from the command to its end:",
        *said,
        sep="\n",
    )
    print(f"\nas fast as it goes: {batches * 32 * 1024 / seconds / 1e6:.1f} M tokens a second")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown CPU"


if __name__ == "__main__":
    if os.environ.get("PREPARE_SPEED_PEER"):
        peer()
    else:
        main()
