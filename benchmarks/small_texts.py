"""Held-out loss and time of nanoGPT's recipe for characters and of GPT-Forge, on any small texts.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/small_texts.py book.txt poems.txt --nanogpt ../nanoGPT --out results
    python benchmarks/small_texts.py book.txt --out results -- --preset shakespeare --dropout 0.3
    python benchmarks/small_texts.py --out results --table

Both train on the first 90% of a text's characters and keep the best checkpoint of their evaluations
on the rest, as nanoGPT's recipe does. Both are processes of their own, and the time is that of the
whole process; with `--jobs` several of them share the device. One function then evaluates both
checkpoints on the whole held-out text, in windows of 256 characters without the text before them;
the last, shorter window counts as well. The loss is in nats per character, whatever the tokenizer.

Flags after `--` are GPT-Forge's, those in `--nanogpt_flags` nanoGPT's. Results are lines of
results.jsonl in `--out`: what is there is not run again, and each call adds to it. To choose
settings, use `--protocol second`: it removes the last tenth of each text first, and holds out the
last tenth of what is left.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import nanogpt
import numpy as np
import torch

from gptforge import load
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.device import select_device
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.model import GPT
from gptforge.report.metrics import read_history
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import byte_lengths
from gptforge.tokenizers.char import CharTokenizer

GPT_PY = Path(__file__).resolve().parents[1] / "gpt.py"
NANOGPT, GPTFORGE = "nanoGPT", "gptforge"
BATCH_SIZE = 64  # windows in a forward pass
Result = dict[str, Any]


def last_lines(output: str) -> str:
    """The end of a failed program's output, without the frames of C++ that hide its traceback."""
    lines = [line for line in output.splitlines() if not line.startswith("frame #")]
    return "\n".join(lines)[-3000:]


def cut(text: str) -> int:
    """Where the held-out text begins, in characters."""
    return int(len(text) * 0.9)


def nats_per_character(
    model: GPT, tokenizer: Tokenizer, text: str, *, window: int, device: torch.device
) -> float:
    """Cross-entropy over a text in windows of `window` characters, in float32.

    A token belongs to the window in which it starts. It is predicted from those before it in its
    window, or, if it is the first, from the previous window. So all tokens but the very first
    count, and none is predicted from more than `window` characters.
    """
    ids = np.asarray(tokenizer.encode(text), np.int64)
    encoded = np.frombuffer(text.encode("utf-8"), np.uint8)
    lengths = byte_lengths(tokenizer)[ids]
    assert lengths.sum() == len(encoded), "the tokens must be the whole text"
    # In UTF-8, bytes 10xxxxxx continue a character.
    characters_before = np.concatenate(([0], np.cumsum((encoded & 0xC0) != 0x80)))
    starts = characters_before[np.cumsum(lengths) - lengths]
    bounds = np.searchsorted(starts, np.arange(0, len(text) + window, window))
    model = model.to(device, torch.float32).eval()
    nats = 0.0
    for first in range(0, len(bounds) - 1, BATCH_SIZE):
        batch = bounds[first : first + BATCH_SIZE + 1]
        longest = int(np.diff(batch).max())
        if longest > model.config.block_size:
            raise SystemExit(
                f"error: a window of {window} characters has {longest} tokens, and the model has "
                f"{model.config.block_size} positions: give a smaller --window"
            )
        inputs = np.zeros((len(batch) - 1, longest), np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        for row, (begin, end) in enumerate(itertools.pairwise(batch)):
            inputs[row, : end - begin] = ids[begin:end]
            following = ids[begin + 1 : end + 1]
            targets[row, : len(following)] = following
        with torch.no_grad():
            x, y = (torch.from_numpy(array).to(device) for array in (inputs, targets))
            nats += float(model(x, y, tokenizer.vocab_size))
    return nats / (len(text) - int(characters_before[lengths[0]]))


class Jobs:
    """Runs commands, each with its share of the CPU's cores and on one of the visible GPUs."""

    def __init__(self, number: int) -> None:
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        threads = str(max(1, (os.cpu_count() or 1) // number))
        self.environments: SimpleQueue[dict[str, str]] = SimpleQueue()
        for job in range(number):
            gpu = {"CUDA_VISIBLE_DEVICES": visible.split(",")[job % count]} if count else {}
            self.environments.put({"OMP_NUM_THREADS": threads, **os.environ, **gpu})

    def run(
        self, command: Sequence[str], cwd: Path | None = None
    ) -> tuple[subprocess.CompletedProcess[str], float]:
        """Run a command; returns its output, stderr included, and its seconds."""
        environment = self.environments.get()
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=cwd, env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            )  # fmt: skip
        finally:
            self.environments.put(environment)
        return done, time.perf_counter() - start


@dataclass(frozen=True)
class Task:
    """A training run, by what identifies its result.

    Attributes:
        sha256: of the text.
        protocol: first, or second if the text's last tenth was removed.
        program: NANOGPT or GPTFORGE.
        flags: that program's, as one shell string.
        window: characters in a window of the evaluation.
    """

    text: str
    sha256: str
    protocol: str
    program: str
    flags: str
    seed: int
    window: int


class Runner:
    """Trains and evaluates tasks, and appends their results to a file.

    Args:
        checkout: nanoGPT's folder, if any task needs it.
        results: the JSON lines file.
        runs: folder for data and runs.
        keep: whether runs stay there after their evaluation.
        jobs: how many tasks run at once, each with its share of the CPU's cores and on one GPU.
    """

    def __init__(
        self, checkout: Path | None, results: Path, runs: Path, *, keep: bool, jobs: int
    ) -> None:
        self.checkout, self.results, self.runs, self.keep = checkout, results, runs, keep
        self.device, self.device_name = select_device("auto")
        self.lock = threading.Lock()
        self.jobs = Jobs(jobs)

    def __call__(self, task: Task, text: str) -> bool:
        """Train, evaluate and save the result; returns whether it succeeded."""
        digest = hashlib.sha256(repr(task).encode()).hexdigest()[:8]
        folder = self.runs / f"{task.text}-{task.program}-{task.seed}-{digest}"
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier, interrupted call
        folder.mkdir(parents=True)
        command, cwd = self.command(task, text, folder)
        done, seconds = self.jobs.run(command, cwd)
        name = f"{task.text}, {task.program}, seed {task.seed}"
        if done.returncode:
            print(f"error: {name}: {shlex.join(command)}\n{last_lines(done.stdout)}", flush=True)
            return False
        with self.lock:  # one evaluation at a time
            found = self.evaluate(task, text, folder, done.stdout)
            facts = {"seconds": seconds, "device": self.device_name, "torch": torch.__version__}
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**asdict(task), **found, **facts}) + "\n")
        print(f"{name}: {found['nats']:.4f} nats/character, {seconds:.0f} s", flush=True)
        if not self.keep:
            shutil.rmtree(folder)
        return True

    def command(self, task: Task, text: str, folder: Path) -> tuple[list[str], Path | None]:
        """Prepare the text; returns the command that trains on it, and where to run it."""
        flags = shlex.split(task.flags)
        if task.program == NANOGPT:
            nanogpt.write_char_dataset(text, folder / "data", cut(text))
            command = nanogpt.train_command(folder / "data", folder, seed=task.seed, flags=flags)
            return command, self.checkout
        path = folder / f"{task.text}.txt"
        path.write_text(text, encoding="utf-8", newline="\n")
        paths = ["--input", str(path), "--out_dir", str(folder / "run")]
        return [sys.executable, str(GPT_PY), *flags, *paths, "--seed", str(task.seed)], None

    def evaluate(self, task: Task, text: str, folder: Path, output: str) -> Result:
        """Loss of the best checkpoint, and how many steps were made until it and in all."""
        tokenizer: Tokenizer
        if task.program == NANOGPT:
            tokenizer = CharTokenizer.from_text(text)
            bundle = read_nanogpt(folder / nanogpt.CHECKPOINT, tokenizer=tokenizer)
            model = bundle.build_model()
            steps, best_step = nanogpt.read_steps(output)
        else:
            loaded = load(folder / "run", device="cpu", dtype="float32")
            model, tokenizer = loaded.model, loaded.tokenizer
            history = read_history(folder / "run" / "metrics.jsonl")
            steps = history.train[-1]["step"] + 1
            best_step = min(history.scored_evals, key=lambda event: event["val_loss"])["step"]
        tail = text[cut(text) :]
        nats = nats_per_character(model, tokenizer, tail, window=task.window, device=self.device)
        return {
            "nats": nats, "steps": steps, "best_step": best_step, "characters": len(text),
            "alphabet": len(set(text)),
        }  # fmt: skip


def read_results(path: Path) -> list[Result]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def find_task(results: Sequence[Result], task: Task) -> Result | None:
    key = asdict(task)
    return next((r for r in results if all(r[name] == key[name] for name in key)), None)


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range if there are several values."""
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def table(results: Sequence[Result]) -> str:
    """A Markdown table per protocol, window and pair of flags; a row per text."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], list[Result]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("protocol", "window", "program", "flags"))
        text = (result["text"], result["sha256"])
        groups.setdefault(key, {}).setdefault(text, []).append(result)
    tables = []
    for (*setting, program, flags), texts in groups.items():
        if program != GPTFORGE:
            continue
        baselines = {
            key[3]: value for key, value in groups.items() if key[:3] == (*setting, NANOGPT)
        }
        for other_flags, other in baselines.items() or [("", {})]:
            title = f"{GPTFORGE} {flags}; {NANOGPT} {other_flags or '(its recipe)'}"
            tables.append(
                f"{title}; protocol {setting[0]}, windows of {setting[1]} characters\n\n"
                + one_table(texts, other)
            )
    return "\n\n".join(tables)


def one_table(
    results: Mapping[tuple[str, str], Sequence[Result]],
    baselines: Mapping[tuple[str, str], Sequence[Result]],
) -> str:
    rows = [
        f"| text | characters | {NANOGPT}, nats/character | {GPTFORGE}, nats/character "
        f"| difference | seconds, {NANOGPT} | seconds, {GPTFORGE} | steps, {NANOGPT} "
        f"| steps, {GPTFORGE} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    differences = []
    for text, trained in results.items():
        baseline = baselines.get(text, [])
        difference = ""
        if baseline:
            a, b = (statistics.fmean(r["nats"] for r in runs) for runs in (baseline, trained))
            differences.append(b / a - 1)
            difference = f"{differences[-1]:+.2%}"
        cells = []
        for runs in (baseline, trained):
            if not runs:
                cells.append(("", "", ""))
                continue
            best = spread([r["best_step"] for r in runs], ",.0f")
            made = statistics.fmean(r["steps"] for r in runs)
            nats = spread([r["nats"] for r in runs], ".4f")
            seconds = spread([r["seconds"] for r in runs], ".0f")
            cells.append((nats, seconds, f"{made:,.0f}, best {best}"))
        (nats, seconds, steps), (forge_nats, forge_seconds, forge_steps) = cells
        rows.append(
            f"| {text[0]} | {trained[0]['characters']:,} | {nats} | {forge_nats} | {difference} "
            f"| {seconds} | {forge_seconds} | {steps} | {forge_steps} |"
        )
    if differences:
        better = sum(d < 0 for d in differences)
        rows.append(
            f"\nLower on {better} of {len(differences)} texts; mean difference "
            f"{statistics.fmean(differences):+.2%}, from {min(differences):+.2%} to "
            f"{max(differences):+.2%}."
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="*", help="text files in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument(
        "--nanogpt", type=Path, help="a checkout of nanoGPT; without: only GPT-Forge"
    )
    parser.add_argument("--nanogpt_flags", default="", help="as one argument")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ... of each program")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--window", type=int, default=256, help="characters")
    parser.add_argument("--protocol", choices=("first", "second"), default="first")
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--table", action="store_true", help="only print the results")
    args, flags = sys.argv[1:], ["--preset", "shakespeare"]
    if "--" in args:
        args, flags = args[: args.index("--")], args[args.index("--") + 1 :]
    options = parser.parse_args(args)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    is_ok = options.table or run_all(options, flags, path)
    print("\n" + table(read_results(path)))
    sys.exit(0 if is_ok else 1)


def run_all(options: argparse.Namespace, flags: Sequence[str], path: Path) -> bool:
    """Run what the results lack; returns whether all succeeded."""
    programs = {NANOGPT: options.nanogpt_flags, GPTFORGE: shlex.join(flags)}
    if not options.nanogpt:
        del programs[NANOGPT]
    results, pending = read_results(path), []
    for file in options.texts:
        text = file.read_text(encoding="utf-8")
        text = text[: cut(text)] if options.protocol == "second" else text
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        for seed in range(1, options.seeds + 1):
            for program, program_flags in programs.items():
                task = Task(
                    file.stem,
                    sha256,
                    options.protocol,
                    program,
                    program_flags,
                    seed,
                    options.window,
                )
                if find_task(results, task) is None:
                    pending.append((task, text))
    # All texts with one seed first: an interrupted call has a comparison of each.
    pending.sort(key=lambda pair: pair[0].seed)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        runs = options.runs or Path(scratch)
        runner = Runner(options.nanogpt, path, runs, keep=bool(options.runs), jobs=options.jobs)
        return all(list(pool.map(lambda pair: runner(*pair), pending)))


if __name__ == "__main__":
    main()
