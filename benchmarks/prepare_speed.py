"""Data preparation: speed beside nanoGPT's method, memory at two sizes, and the data loader.

    pip install -e '.[data]' datasets
    python benchmarks/prepare_speed.py                       all of it, about ten minutes on 2 cores
    python benchmarks/prepare_speed.py --parts speed         one part: speed, memory, loader
    python benchmarks/prepare_speed.py --megabytes 50        less text for the comparison

The text is source code and documentation of this machine's Python and its packages, as JSON lines;
a gigabyte takes several copies. All of it is in a temporary folder and is deleted.

- speed: `gptforge prepare` from command to index, with reading, splitting, hashing and writing,
  beside tiktoken's `encode_ordinary` on each document in a `datasets.map` and the copy into one
  memory-mapped file, as in nanoGPT's prepare.py (without the time to load the data set). One
  process each, then all cores. No text is repeated.
- memory: peak of all processes of a preparation (sum of their PSS), at 100 MB and 1 GB, as one text
  and as JSON lines.
- loader: time spent waiting for batches of 131,072 tokens, one every 262 ms, that is at 500,000
  tokens/s; private memory over 100,000 batches.
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
SUFFIXES = {".py", ".txt", ".md", ".rst", ".h", ".hpp", ".pyi", ".js", ".css", ".html"}
MB = 10**6
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="speed,memory,loader")
    parser.add_argument("--megabytes", type=int, default=100, help="text for the comparison")
    parser.add_argument("--large", type=int, default=1000, help="megabytes of the larger text")
    parser.add_argument("--repeats", type=int, default=3)
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
            speed(here, args.megabytes, args.repeats)
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
            if path.suffix not in SUFFIXES or not path.is_file() or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip() and "\0" not in text:
                yield text


def build(path: Path, megabytes: int) -> int:
    """Write text as JSON lines or as one text, by the suffix; returns its bytes."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * MB:
            before = written
            for text in documents():
                as_line = json.dumps({"text": text}) if path.suffix == ".jsonl" else text
                file.write(as_line + "\n")
                written += len(text.encode("utf-8"))
                if written >= megabytes * MB:
                    break
            assert written > before
    return written


def speed(here: Path, megabytes: int, repeats: int) -> None:
    source = here / "text.jsonl"
    num_bytes = build(source, megabytes)
    with source.open(encoding="utf-8") as file:
        count = sum(1 for _ in file)
    print(
        f"\n{num_bytes / MB:.0f} MB of text, {count:,} documents, none repeated"
        if num_bytes < sum(len(t.encode()) for t in documents())
        else "\nwith repetitions"
    )
    implementations = {
        "gptforge": lambda n: run_gptforge(source, here / "gptforge", n, fast=True),
        "gptforge without gigatoken": lambda n: run_gptforge(
            source, here / "gptforge", n, fast=False
        ),
        "nanoGPT's method": lambda n: run_nanogpt(source, here / "nanogpt", n),
    }
    print("\n| processes | implementation | MB/s, median (min, max) | MB per second of CPU time |")
    print("| --- | --- | --- | --- |")
    for processes in sorted({1, CORES}):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
        for _ in range(repeats):
            for name, implementation in implementations.items():
                times[name].append(implementation(processes))
        walls = {n: sorted(num_bytes / MB / wall for wall, _ in t) for n, t in times.items()}
        cpus = {n: sorted(num_bytes / MB / cpu for _, cpu in t) for n, t in times.items()}
        for name in implementations:
            wall, cpu = walls[name][repeats // 2], cpus[name][repeats // 2]
            speedups = walls["gptforge"][repeats // 2] / wall, cpus["gptforge"][repeats // 2] / cpu
            print(
                f"| {processes} | {name} | {wall:.1f} ({walls[name][0]:.1f}, "
                f"{walls[name][-1]:.1f}), speedup {speedups[0]:.1f} x | {cpu:.1f}, speedup "
                f"{speedups[1]:.1f} x |",
                flush=True,
            )
    a, b = (np.fromfile(here / name / "train.bin", np.uint16) for name in ("gptforge", "nanogpt"))
    print(f"\nthe same {len(a):,} tokens: {np.array_equal(a, b)}")


def run_gptforge(source: Path, out: Path, processes: int, *, fast: bool) -> tuple[float, float]:
    """Wall and CPU seconds of the command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--out", str(out)]
    command += ["--val_fraction", "0", "--workers", str(processes), "--raw_bin", "true"]
    command += ["--shard_mb", "16"]
    environment = dict(os.environ)
    if not fast:
        # An empty package of that name hides the real one.
        empty = out.parent / "without" / "gigatoken"
        empty.mkdir(parents=True, exist_ok=True)
        (empty / "__init__.py").write_text("raise ImportError\n")
        environment["PYTHONPATH"] = f"{empty.parent}:{environment.get('PYTHONPATH', '')}"
    start, cpu = time.perf_counter(), _cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start, _cpu_seconds(resource.RUSAGE_CHILDREN) - cpu


def _cpu_seconds(*targets: int) -> float:
    usages = [resource.getrusage(target) for target in targets]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_nanogpt(source: Path, out: Path, processes: int) -> tuple[float, float]:
    """Wall and CPU seconds of nanoGPT's method, in a separate process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, __file__, "--folder", str(out)]
    environment = {**os.environ, "PREPARE_SPEED_BASELINE": f"{source}:{processes}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    wall, cpu = done.stdout.splitlines()[-1].split()
    return float(wall), float(cpu)


def nanogpt_baseline() -> None:
    """Prepare as nanoGPT's prepare.py does, and print the seconds."""
    import datasets

    from gptforge.tokenizers.gpt2 import GPT2Tokenizer

    source, processes = os.environ["PREPARE_SPEED_BASELINE"].rsplit(":", 1)
    out = Path(sys.argv[-1])
    datasets.disable_progress_bars()
    data = datasets.load_dataset(
        "json", data_files=source, split="train", cache_dir=str(out / "cache")
    )
    encoding = GPT2Tokenizer().encoding
    eot = encoding.eot_token

    def process(example: dict[str, str]) -> dict[str, object]:
        # nanoGPT appends the end-of-text id; GPT-Forge prepends it.
        ids = [eot, *encoding.encode_ordinary(example["text"])]
        return {"ids": ids, "len": len(ids)}

    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    start, cpu = time.perf_counter(), _cpu_seconds(*both)
    tokenized = data.map(process, remove_columns=["text"], num_proc=int(processes))
    total = int(np.sum(tokenized["len"], dtype=np.uint64))
    target = np.memmap(out / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    at, batches = 0, min(1024, len(tokenized))
    for number in range(batches):
        batch = tokenized.shard(num_shards=batches, index=number, contiguous=True)
        ids = np.concatenate(batch.with_format("numpy")["ids"])
        target[at : at + len(ids)] = ids
        at += len(ids)
    target.flush()
    print(time.perf_counter() - start, _cpu_seconds(*both) - cpu)


def memory(here: Path, sizes: tuple[int, int], forms: list[str]) -> None:
    print("\n| text | MB | processes | MB/s | peak memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    for suffix, form in ((".txt", "one text"), (".jsonl", "JSON lines")):
        if suffix[1:] not in forms:
            continue
        for megabytes in sizes:
            source = here / f"large{suffix}"
            num_bytes = build(source, megabytes)
            out = here / f"shards{suffix}"
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "gptforge", "prepare", str(source), "--out", str(out)]
            start = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            peak = 0
            while child.poll() is None:
                peak = max(peak, sum(_pss(pid) for pid in _process_tree(child.pid)))
                time.sleep(0.05)
            assert child.returncode == 0
            rate = num_bytes / MB / (time.perf_counter() - start)
            print(
                f"| {form} | {num_bytes / MB:.0f} | {CORES} | {rate:.1f} | {peak / MB:.0f} |",
                flush=True,
            )
            source.unlink()


def _process_tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in tasks.read_text().split()]
            except OSError:
                continue
    return found


def _pss(pid: int) -> int:
    """Proportional set size of a process, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def loader(here: Path, megabytes: int, batches: int) -> None:
    import torch

    from gptforge.data.dataloader import DataLoader
    from gptforge.data.shard_index import read_index
    from gptforge.data.token_dataset import ShardDataset

    torch.set_num_threads(1)
    out = here / "shards.jsonl"
    if not out.exists():
        build(here / "large.jsonl", megabytes)
        run_gptforge(here / "large.jsonl", out, CORES, fast=True)
    index = read_index(out)
    assert index is not None
    tokens = ShardDataset(index.shards("train"), vocab_size=index.load_tokenizer().vocab_size)
    options = {"context_length": 1024, "seed": 1, "shuffle": True, "device": torch.device("cpu")}
    print(f"\n{len(tokens):,} tokens in {len(tokens.shards)} shards")
    batch, rate, steps = 128, 500_000, 100
    step_time = batch * 1024 / rate
    dataloader = DataLoader(tokens, global_batch_size=batch, **options)
    dataloader.next_batch()
    waits = []
    for _ in range(steps):
        time.sleep(step_time)  # stands for a step on a GPU
        start = time.perf_counter()
        dataloader.next_batch()
        waits.append(time.perf_counter() - start)
    share = sum(waits) / (steps * step_time)
    print(
        f"waiting, at {rate:,} tokens/s: {share:.3%} of the time "
        f"({1e3 * sum(waits) / steps:.2f} ms of a step of {1e3 * step_time:.0f}, at most "
        f"{1e3 * max(waits):.2f})"
    )
    dataloader = DataLoader(tokens, global_batch_size=32, **options)
    start = time.perf_counter()
    print("\n| batches of 32 x 1024 | private memory, MB | mapped files, MB |")
    print("| --- | --- | --- |")
    for number in range(1, batches + 1):
        dataloader.next_batch()
        if number in (100, batches // 100, batches // 10, batches // 2, batches):
            private, mapped = (_status(name) / MB for name in ("RssAnon", "RssFile"))
            print(f"| {number:,} | {private:.1f} | {mapped:.1f} |", flush=True)
    seconds = time.perf_counter() - start
    flags = ["--preset", "debug", "--max_steps", "20", "--out_dir", str(here / "run")]
    command = [sys.executable, "-m", "gptforge", "--input", str(out), *flags]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("text:", "Best"))]
    print(
        "\n20 training steps of a tiny model on it took "
        f"{time.perf_counter() - start:.0f} s in total:",
        *lines,
        sep="\n",
    )
    print(f"\nwithout pauses: {batches * 32 * 1024 / seconds / 1e6:.1f} M tokens/s")


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
    if os.environ.get("PREPARE_SPEED_BASELINE"):
        nanogpt_baseline()
    else:
        main()
