"""How far the rule for texts (`--preset auto`) is from the best of its neighbors.

    python benchmarks/recipe_grid.py book.txt poems.txt --out results --jobs 2
    python benchmarks/recipe_grid.py book.txt --bytes 10000 --out results     # a part of a text
    python benchmarks/recipe_grid.py book.txt --rows cpu --out results        # the CPU's, on a GPU
    python benchmarks/recipe_grid.py --out results --table                    # draws the picture

The last tenth of each text is removed first, and the run holds out the last tenth of what is left,
so the choice of a recipe never sees the text that is quoted. One run is the rule's; each of the
others changes one thing: half or twice the weight decay or the learning rate, less or more dropout,
a narrower or wider model and a smaller or larger batch with as many steps as take the same FLOPs, a
wider model with all steps, twice the steps, another vocabulary. The loss is in nats per character,
of the best checkpoint as `gptforge runs` lists it.

Results are lines of results.jsonl in `--out`: what is there is not run again. The picture is
recipe-grid.png.
"""

import argparse
import itertools
import json
import shlex
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from small_texts import GPT_PY, Jobs, Result, cut, last_lines, read_results

from gptforge.builders.teachers import cost_with_teachers
from gptforge.config import Config
from gptforge.device import select_device
from gptforge.estimate.formulas import default_vocab_size, flops_per_token
from gptforge.recipe import FITTED_PRESETS, HEAD_SIZES, VOCAB_SIZES, DeviceClass, make_recipe
from gptforge.report.curves import TEXT_COLOR, new_figure
from gptforge.report.metrics import read_history

RULE = "the rule"
CPU_ID_COST = 2.44e-4
"""How much each id of the vocabulary adds to a step of the CPU's 4 x 128 models, as a share of the
time without any: 1,920 ids take 1.19 times as long as 960 (`gptforge bench` on two CPU cores)."""
COLORS = (
    *("#4c78a8", "#d1495b", "#2a9d8f", "#b8791f", "#7a6bb0", "#8fbf5b", "#c0628f"),
    *("#1f2937", "#f0b429", "#7f5539"),
)
MAX_COLORED_CHANGES = 4
MAX_DIFFERENCE = 10.0  # percent; larger ones are drawn there
Flags = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A run, by what identifies its result; `bytes` includes what the run holds out."""

    text: str
    bytes: int
    preset: str
    device: str
    change: str
    flags: str
    seed: int


def cut_text(path: Path, num_bytes: int) -> str:
    """A text without its last tenth; with `num_bytes`, about so many of them from its middle."""
    text = path.read_text(encoding="utf-8")
    text = text[: cut(text)]
    if num_bytes:
        text = text[len(text) // 3 :].encode()[:num_bytes].decode(errors="ignore")
    return text


def neighbors(num_bytes: int, preset: str, device: DeviceClass) -> dict[str, Flags]:
    """The flags of each change to the rule for a text with so many bytes to train on."""
    rule = Config(**make_recipe(num_bytes, device, preset=preset).values)
    head = HEAD_SIZES[device]
    vocab_size = VOCAB_SIZES.get(rule.tokenizer, default_vocab_size(num_bytes))

    def cost(config: Config) -> float:
        """FLOPs of a step, with the share of the teachers."""
        model = replace(config.model, vocab_size=vocab_size)
        tokens = config.batch_size * config.gradient_accumulation_steps * config.context_length
        return flops_per_token(model, config.context_length) * tokens * cost_with_teachers(config)

    def same_cost(**values: Any) -> Flags:
        changed = replace(rule, **values)
        return values | {"max_steps": max(1, round(rule.max_steps * cost(rule) / cost(changed)))}

    def decay(factor: float) -> Flags:
        names = ("weight_decay", "muon_weight_decay")
        return {name: round(getattr(rule, name) * factor, 4) for name in names}

    def rate(factor: float) -> Flags:
        names = ("max_lr", "min_lr", "muon_lr")
        return {name: float(f"{getattr(rule, name) * factor:.3g}") for name in names}

    def width(factor: float) -> Flags:
        n_head = max(1, round(rule.n_embd * factor / head))
        return same_cost(n_embd=n_head * head, n_head=n_head)

    def batch(factor: float) -> Flags:
        # Both flags: the rule divides its batch by either of them.
        return same_cost(
            batch_size=max(1, round(rule.batch_size * factor)),
            gradient_accumulation_steps=rule.gradient_accumulation_steps,
        )

    changes: dict[str, Flags] = {
        RULE: {},
        "half the decay": decay(0.5),
        "twice the decay": decay(2),
        "dropout - 0.1": {"dropout": max(0.0, round(rule.dropout - 0.1, 2))},
        "dropout + 0.1": {"dropout": round(rule.dropout + 0.1, 2)},
        "half the rate": rate(0.5),
        "twice the rate": rate(2),
        "narrower": width(0.7),
        "wider": width(1.5),
        "wider, all steps": width(1.5) | {"max_steps": rule.max_steps},
        "half the batch": batch(0.5),
        "twice the batch": batch(2),
        "twice the steps": {"max_steps": 2 * rule.max_steps},
        "token noise": {"token_noise": 0.05 if rule.token_noise == 0 else 0.0},
    }
    if rule.tokenizer == "bpe":
        size = default_vocab_size(num_bytes)
        for name, factor in (("half the vocabulary", 0.5), ("twice the vocabulary", 2)):
            changes[name] = {"vocab_size": max(320, round(size * factor / 64) * 64)}
        if device == "cpu" and rule.n_embd == 128:
            for name, factor in (("half", 0.5), ("1.5 times", 1.5), ("twice", 2), ("3 times", 3)):
                ids = max(320, round(size * factor / 64) * 64)
                longer = (1 + CPU_ID_COST * ids) / (1 + CPU_ID_COST * size)
                changes[f"{name} the vocabulary, same time"] = {
                    "vocab_size": ids, "max_steps": round(rule.max_steps / longer)
                }  # fmt: skip
    if rule.tokenizer in ("bpe", "char"):
        other = "char" if rule.tokenizer == "bpe" else "bpe"
        changes[f"tokenizer {other}"] = {"tokenizer": other, "teachers": 0}
    if rule.teachers:
        changes["no teachers"] = same_cost(teachers=0)
    if rule.dropout == 0:
        del changes["dropout - 0.1"]
    return changes


class Runner:
    """Runs tasks, several at once, and appends their results to a file."""

    def __init__(self, results: Path, scratch: Path, jobs: int) -> None:
        self.results, self.scratch = results, scratch
        self.lock = threading.Lock()
        self.jobs = Jobs(jobs)

    def __call__(self, task: Task, path: Path) -> bool:
        """Train and save the result; returns whether it succeeded."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        paths = ["--input", str(path), "--out_dir", str(folder / "run"), "--sample_every", "0"]
        flags = ["--preset", task.preset, "--device", task.device, *shlex.split(task.flags)]
        command = [sys.executable, str(GPT_PY), *flags, *paths, "--seed", str(task.seed)]
        done, seconds = self.jobs.run(command)
        name = f"{task.text}, {task.bytes:,} bytes, {task.change}, seed {task.seed}"
        if done.returncode:
            print(f"error: {name}: {shlex.join(command)}\n{last_lines(done.stdout)}", flush=True)
            return False
        metrics = folder / "run" / "metrics.jsonl"
        best, end = read_history(metrics).best, read_results(metrics)[-1]
        assert best is not None, "every run evaluates its last step"
        found = {
            "nats": best["val_nats_per_char"], "best_step": best["step"], "steps": end["step"],
            "seconds": seconds, "torch": torch.__version__,
        }  # fmt: skip
        with self.lock, self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(task), **found}) + "\n")
        print(f"{name}: {found['nats']:.4f} nats/character, {seconds:.0f} s", flush=True)
        shutil.rmtree(folder)
        return True


def by_text(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """The runs of each change, of each text whose rule was run; by size."""
    texts: dict[str, dict[str, list[Result]]] = {}
    for result in sorted(results, key=lambda r: r["bytes"]):
        title = f"{result['text']}, {result['bytes'] / 1e6:.2g} MB"
        title += "" if result["preset"] == "auto" else f", {result['preset']}"
        texts.setdefault(title, {}).setdefault(result["change"], []).append(result)
    return {title: changes for title, changes in texts.items() if RULE in changes}


def mean(runs: Sequence[Result], name: str = "nats") -> float:
    return statistics.fmean(run[name] for run in runs)


def table(results: Sequence[Result]) -> str:
    """A Markdown table for each text, the best change first."""
    tables = []
    for title, changes in by_text(results).items():
        rule = mean(changes[RULE])
        rows = [
            f"| {title} | nats per character | difference | seeds | best step of | flags |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for change, runs in sorted(changes.items(), key=lambda item: mean(item[1])):
            steps = f"{mean(runs, 'best_step'):,.0f} of {mean(runs, 'steps'):,.0f}"
            flags = f"`{runs[0]['flags']}`" if runs[0]["flags"] else ""
            rows.append(
                f"| {change} | {mean(runs):.4f} | {mean(runs) / rule - 1:+.2%} | {len(runs)} "
                f"| {steps} | {flags} |"
            )
        tables.append("\n".join(rows))
    return "\n\n".join(tables)


def draw(results: Sequence[Result], path: Path) -> None:
    """A row for each text: the differences of all changes from the rule, in percent."""
    texts = by_text(results)
    names = dict.fromkeys(change for changes in texts.values() for change in changes)
    names.pop(RULE)
    # A color for each change, or for each kind of change if there are many.
    groups = {name: name if len(names) <= MAX_COLORED_CHANGES else _kind(name) for name in names}
    colors = dict(zip(dict.fromkeys(groups.values()), itertools.cycle(COLORS), strict=False))
    figure = new_figure()
    figure.set_size_inches(10, 1.6 + 0.52 * len(texts))
    axes = figure.add_subplot()
    for row, changes in enumerate(texts.values()):
        rule = mean(changes[RULE])
        axes.axhline(row, color="#d5d5d5", linewidth=0.8, zorder=0)
        for change, runs in changes.items():
            if change == RULE:
                continue
            color, difference = colors[groups[change]], 100 * (mean(runs) / rule - 1)
            axes.plot(
                min(difference, MAX_DIFFERENCE), row, _marker(change), color=color, markersize=7.5,
                alpha=0.85,
            )  # fmt: skip
    axes.axvline(0, color=TEXT_COLOR, linewidth=1)
    axes.axvspan(-1, 0, color="#2a9d8f", alpha=0.10, linewidth=0)
    axes.set_yticks(range(len(texts)), list(texts))
    axes.set_ylim(len(texts) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT_COLOR, labelsize=9.5)
    capped = f"{MAX_DIFFERENCE:.0f}: or more; " if axes.get_xlim()[1] >= MAX_DIFFERENCE else ""
    label = f"held-out loss, difference from the rule in % ({capped}shaded: at most 1% better)"
    axes.set_xlabel(label, color=TEXT_COLOR)
    for group, color in colors.items():
        axes.plot([], [], _marker(group) if group in names else "s", color=color, label=group)
    if not colors.keys() <= names.keys():
        axes.plot([], [], "v", color="#888888", label="less")
        axes.plot([], [], "^", color="#888888", label="more")
    axes.legend(
        frameon=False, fontsize=9.5, labelcolor=TEXT_COLOR, loc="lower center",
        bbox_to_anchor=(0.5, 1.0), ncols=5,
    )  # fmt: skip
    figure.savefig(path)


def _marker(change: str) -> str:
    """Down for less, up for more, and a circle for neither."""
    if _kind(change) in ("token noise", "tokenizer"):
        return "o"
    return "v" if change.startswith(("half", "narrower", "dropout -", "no ")) else "^"


def _kind(change: str) -> str:
    for kind in ("decay", "dropout", "rate", "batch", "vocabulary", "teachers", "token noise"):
        if kind in change:
            return kind
    if change.startswith(("narrower", "wider")):
        return "width"
    return "steps" if "steps" in change else "tokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="*", help="text files in UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--bytes", type=int, default=0, help="of each text; 0: all")
    parser.add_argument("--preset", choices=tuple(FITTED_PRESETS), default="auto")
    parser.add_argument("--changes", nargs="+", help="only these; the rule is always run")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 1, 2, ... of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--rows", choices=("gpu", "cpu"), help="of the rule, if not those for the device"
    )
    parser.add_argument("--table", action="store_true", help="only print and draw the results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.jsonl"
    is_ok = options.table or run_all(options, path)
    results = read_results(path)
    print("\n" + table(results))
    if by_text(results):
        draw(results, options.out / "recipe-grid.png")
    sys.exit(0 if is_ok else 1)


def run_all(options: argparse.Namespace, path: Path) -> bool:
    """Run what the results lack; returns whether all succeeded."""
    device = select_device(options.device)[0].type
    device_rows: DeviceClass = FITTED_PRESETS[options.preset] or (
        "gpu" if device == "cuda" else "cpu"
    )
    rows: DeviceClass = options.rows or device_rows
    names = [field.name for field in fields(Task)]
    done = {tuple(result[name] for name in names) for result in read_results(path)}
    pending: list[tuple[Task, Path]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, options.seeds + 1):
            for file in options.texts:
                text = cut_text(file, options.bytes)
                copy = Path(scratch, f"{file.stem}.txt")
                copy.write_text(text, encoding="utf-8", newline="\n")
                size = len(text.encode())
                for change, values in neighbors(int(size * 0.9), options.preset, rows).items():
                    if options.changes and change not in (RULE, *options.changes):
                        continue
                    if rows != device_rows:  # the run would choose others itself
                        rule = make_recipe(
                            int(size * 0.9), rows, preset=options.preset, explicit=values
                        )
                        values = rule.values | values
                    flags = " ".join(f"--{name} {value}" for name, value in values.items())
                    task = Task(file.stem, size, options.preset, device, change, flags, seed)
                    if tuple(asdict(task).values()) not in done:
                        pending.append((task, copy))
        runner = Runner(path, Path(scratch), options.jobs)
        with ThreadPoolExecutor(options.jobs) as pool:
            return all(list(pool.map(lambda pair: runner(*pair), pending)))


if __name__ == "__main__":
    main()
