"""GPT-2 small on much text: AdamW beside Muon, fp8 beside bf16, and the model fine-tuned.

    python benchmarks/collect_text.py --out data/corpus
    gptforge prepare data/corpus --split_on '<|endoftext|>' --out data/tokens
    python benchmarks/pretraining.py sweep data/tokens --out results
    python benchmarks/pretraining.py race data/tokens --out results
    python benchmarks/pretraining.py dtypes data/tokens --out results
    python benchmarks/pretraining.py finetune book.txt poems.txt --init_from RUN --out results

- `sweep`: short runs over learning rates and weight decays, of AdamW and of Muon.
- `race`: the best AdamW of the sweep for `--tokens`, and the best Muon for `--fraction` of them. At
  how many tokens does Muon reach the held-out loss of AdamW?
- `dtypes`: the same seed in bfloat16 and in fp8.
- `finetune`: on each text, `--preset auto` from scratch, and `--preset finetune` from a run of the
  race with `--share` of the steps. Losses are in bits per byte, since the tokenizers differ.

Runs are child processes of `gptforge train`, `--jobs` at once; flags after `--` are for all of
them. `--out` gets pretraining.json with all results, and a picture of each mode; the table comes
last. Run folders are in `--runs`; those of the race are kept. A finished run is not run again, an
unfinished one resumes: the same command continues after Ctrl-C, SIGTERM, a kill, or `--budget_s`,
after which it lets its runs save and ends. Saving can take half a minute.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretraining_results import (
    COMPLETE,
    FINE_TUNED,
    FROM_SCRATCH,
    draw,
    optimizer_of,
    parse,
    row,
    table,
    verdict,
)
from small_texts import Result

from gptforge import UserError, files
from gptforge.builders.text_presets import resolve_auto
from gptforge.cli.parsing import parse_train_args
from gptforge.config import Config
from gptforge.report.metrics import series
from gptforge.report.run_info import read_run
from gptforge.sweep import scheduler

WARMUP = 0.1  # of the steps
MIN_LR = 0.1  # of the rate
AUXILIARY_RATE, AUXILIARY_DECAY = 1e-3, 0.1  # of AdamW, for what Muon does not train
RESULTS = "pretraining.json"


@dataclass(frozen=True)
class Trial:
    """A run, by what identifies its result."""

    mode: str
    name: str
    data: str
    flags: str


class Stop(BaseException):
    """The time is up, or a signal came."""


def optimizer_flags(optimizer: str, rate: float, decay: float) -> list[str]:
    """Rate and decay are those of the matrices; with Muon the rest has a fixed one."""
    flags = ["--optimizer", optimizer]
    if optimizer == "muon":
        flags += ["--muon_lr", f"{rate:g}", "--muon_weight_decay", f"{decay:g}"]
        rate, decay = AUXILIARY_RATE, AUXILIARY_DECAY
    flags += ["--max_lr", f"{rate:g}", "--min_lr", f"{MIN_LR * rate:g}"]
    return [*flags, "--weight_decay", f"{decay:g}"]


def training_flags(
    options: argparse.Namespace, *, evals: int, steps: int = 0, tokens: float = 0
) -> list[str]:
    """Flags of a run with GPT-2's preset and so many steps or tokens."""
    flags = ["--preset", "gpt2", "--seed", str(options.seed), *options.flags]
    steps = steps or max(1, round(tokens / parse(shlex.join(flags)).tokens_per_step))
    return [
        *("--preset", "gpt2", "--seed", str(options.seed), "--max_steps", str(steps)),
        *("--warmup_steps", str(round(WARMUP * steps)), "--eval_every", str(-(-steps // evals))),
        *("--eval_tokens", str(options.eval_tokens), "--sample_every", "0"),
        *options.flags,
    ]


def fingerprint(data: Path) -> str:
    """Name of the data and a hash of its start, so that results of other data are not taken."""
    paths = sorted(data.glob("*.bin")) if data.is_dir() else [data]
    if not data.exists() or not paths:
        raise SystemExit(f"error: {data}: no token shards; write them with `gptforge prepare`")
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return f"{data.stem} {digest.hexdigest()[:12]}"


def center_first(values: Sequence[float]) -> list[float]:
    """From the middle outwards, so that an interrupted sweep has seen the likely ones."""
    middle = (len(values) - 1) / 2
    return sorted(values, key=lambda value: abs(values.index(value) - middle))


def sweep_trials(options: argparse.Namespace) -> list[Trial]:
    grids = {
        "adamw": (options.rates, options.decays),
        "muon": (options.muon_rates, options.muon_decays),
    }
    data = fingerprint(options.data)
    base = training_flags(options, tokens=options.tokens, evals=2)
    trials = {
        optimizer: [
            Trial(
                "sweep",
                f"{optimizer}, rate {rate:g}, decay {decay:g}",
                data,
                shlex.join([*base, *optimizer_flags(optimizer, rate, decay)]),
            )
            for decay in center_first(decays)
            for rate in center_first(rates)
        ]
        for optimizer, (rates, decays) in grids.items()
    }
    # Alternating, so that both have had the same chance whenever a call ends.
    longest = max(map(len, trials.values()))
    return [grid[i] for i in range(longest) for grid in trials.values() if i < len(grid)]


def best_of_sweep(results: Sequence[Result], optimizer: str, data: str) -> tuple[float, float]:
    """Rate and decay with the lowest loss of the longest runs of a sweep."""
    found = [
        result
        for result in results
        if result["mode"] == "sweep" and result["data"] == data and result["state"] == COMPLETE
        and result["val_loss"] is not None and optimizer_of(result)[0] == optimizer
    ]  # fmt: skip
    if not found:
        raise SystemExit(
            f"error: no finished run of {optimizer} in the sweep of this data: run `sweep` with "
            "the same --out first, or give a rate and a decay"
        )
    longest = max(result["max_steps"] for result in found)
    best = min((r for r in found if r["max_steps"] == longest), key=lambda r: r["val_loss"])
    return optimizer_of(best)[1:]


def race_trials(options: argparse.Namespace, results: Sequence[Result]) -> list[Trial]:
    data, trials = fingerprint(options.data), []
    for optimizer, rate, decay in (
        ("adamw", options.rate, options.decay),
        ("muon", options.muon_rate, options.muon_decay),
    ):
        if rate is None or decay is None:
            best_rate, best_decay = best_of_sweep(results, optimizer, data)
            rate = best_rate if rate is None else rate
            decay = best_decay if decay is None else decay
        tokens = options.tokens * (options.fraction if optimizer == "muon" else 1)
        flags = training_flags(options, tokens=tokens, evals=options.evals)
        name = f"{optimizer}, rate {rate:g}, decay {decay:g}"
        flags += optimizer_flags(optimizer, rate, decay)
        trials.append(Trial("race", name, data, shlex.join(flags)))
    return trials


def dtype_trials(options: argparse.Namespace) -> list[Trial]:
    flags = training_flags(options, steps=options.steps, evals=options.evals)
    flags += optimizer_flags("adamw", options.rate, options.decay)
    data = fingerprint(options.data)
    return [
        Trial("dtypes", dtype, data, shlex.join([*flags, "--dtype", dtype]))
        for dtype in options.dtypes
    ]


def finetune_trials(options: argparse.Namespace) -> list[Trial]:
    """From scratch and fine-tuned for each text; the latter with a share of the former's steps."""
    common = ["--seed", str(options.seed), "--sample_every", "0", *options.flags]
    trials = []
    for text in options.data:
        data = fingerprint(text)
        scratch = ["--preset", "auto", *common]
        tuned = ["--preset", "finetune", "--init_from", str(options.init_from), *common]
        config = parse_train_args([*scratch, "--input", str(text)])
        steps = resolve_auto(*config, device=options.device).max_steps
        tuned += ["--max_steps", str(max(1, round(options.share * steps)))]
        trials.append(Trial("finetune", FROM_SCRATCH, data, shlex.join(scratch)))
        trials.append(Trial("finetune", FINE_TUNED, data, shlex.join(tuned)))
    return trials


def read_results(out: Path) -> list[Result]:
    path = out / RESULTS
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return list(found)


def find(results: Iterable[Result], trial: Trial) -> Result | None:
    key = asdict(trial)
    return next((r for r in results if all(r[name] == key[name] for name in key)), None)


def read_result(trial: Trial, folder: Path) -> Result:
    """What a run has reached by its logs, finished or not."""
    run = read_run(folder)
    history = run.history
    best = history.best or {}
    return asdict(trial) | {
        "state": run.state,
        "steps": run.steps,
        "max_steps": run.config.max_steps,
        "tokens_per_step": run.config.tokens_per_step,
        "val_loss": best.get("val_loss"),
        "val_bpb": best.get("val_bpb"),
        "best_step": best.get("step"),
        "last_val_loss": history.scored_evals[-1]["val_loss"] if history.scored_evals else None,
        "curve": [[e["step"], e["val_loss"], e["val_bpb"]] for e in history.scored_evals],
        "ms_per_step": statistics.median(series(history.timed, "dt_ms") or [0.0]),
        "tok_per_sec": history.tok_per_sec,
        "seconds": run.seconds,
        "facts": run.facts,
    }


class Runner:
    """Runs what the results lack, and saves the results after each run."""

    def __init__(self, options: argparse.Namespace, results: list[Result]) -> None:
        self.options, self.results, self.failed = options, results, False

    def folder(self, trial: Trial) -> Path:
        digest = hashlib.sha256(repr(trial).encode()).hexdigest()[:8]
        name = "".join(c if c.isalnum() or c == "." else "-" for c in trial.name.lower())
        return Path(self.options.runs) / f"{trial.mode}-{name.replace('--', '-')}-{digest}"

    def save(self, trial: Trial) -> Result:
        """Put a run's result, finished or not, in the place of an earlier one."""
        found = read_result(trial, self.folder(trial))
        old = find(self.results, trial)
        if old is not None:
            self.results.remove(old)
        self.results.append(found)
        files.atomic_write(self.options.out / RESULTS, json.dumps(self.results, indent=1))
        return found

    def run(self, trials: Sequence[Trial], inputs: Sequence[Path]) -> None:
        """Run all that are not finished; on `Stop` and Ctrl-C save what they have reached."""
        pending: dict[str, Trial] = {}
        runs = []
        for trial, path in zip(trials, inputs, strict=True):
            if (result := find(self.results, trial)) and result["state"] == COMPLETE:
                continue
            folder = self.folder(trial)
            pending[folder.name] = trial
            args = [*shlex.split(trial.flags), "--input", str(path), "--out_dir", str(folder)]
            runs.append(scheduler.Run(folder.name, self.options.seed, folder, tuple(args)))

        def on_end(run: scheduler.Run, code: int) -> None:
            trial = pending.pop(run.trial)
            if code:
                self.failed = True
                print(f"error: {trial.name}: {scheduler.last_error(run, code)}", flush=True)
                return
            found = self.save(trial)
            print(f"{trial.data.split()[0]}, {row(found)}", flush=True)
            if trial.mode != "race":
                shutil.rmtree(run.folder)

        devices = scheduler.find_devices(Config(device=self.options.device))

        def start(run: scheduler.Run, slot: int) -> scheduler.Process:
            device, jobs = devices[slot % len(devices)], self.options.jobs
            return scheduler.start_process(run, device=device, jobs=jobs)

        try:
            scheduler.run_all([runs], jobs=self.options.jobs, start=start, on_end=on_end)
        except (Stop, KeyboardInterrupt):
            for trial in pending.values():
                with suppress(UserError):  # not started
                    self.save(trial)
            raise


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, help="folder of results and pictures")
    common.add_argument("--runs", type=Path, help="of run folders; default: runs in --out")
    common.add_argument("--jobs", type=int, default=1, help="runs at once, spread over the GPUs")
    common.add_argument("--seed", type=int, default=1)
    common.add_argument("--device", default="auto")
    common.add_argument("--budget_s", type=float, default=0, help="stop then and save; 0: never")
    common.add_argument("--table", action="store_true", help="only print and draw the results")
    shards = argparse.ArgumentParser(add_help=False, parents=[common])
    shards.add_argument("data", type=Path, help="folder written by `gptforge prepare`")
    shards.add_argument("--eval_tokens", type=int, default=2**19, help="of an evaluation")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)

    sweep = modes.add_parser("sweep", parents=[shards])
    sweep.add_argument("--tokens", type=float, default=20e6, help="of a run")
    numbers: dict[str, Any] = {"type": float, "nargs": "+"}
    sweep.add_argument("--rates", **numbers, default=(6e-4, 1.2e-3, 2.4e-3))
    sweep.add_argument("--decays", **numbers, default=(0.1, 0.4, 1.6))
    sweep.add_argument("--muon_rates", **numbers, default=(1e-3, 2e-3, 4e-3))
    sweep.add_argument("--muon_decays", **numbers, default=(0.1, 0.4, 1.6))

    race = modes.add_parser("race", parents=[shards])
    race.add_argument("--tokens", type=float, default=500e6, help="of AdamW")
    race.add_argument("--fraction", type=float, default=0.65, help="of them for Muon")
    race.add_argument("--evals", type=int, default=20, help="of a run")
    race.add_argument("--rate", type=float, help="of AdamW; default: the best of the sweep")
    race.add_argument("--decay", type=float, help="of AdamW; default: the best of the sweep")
    race.add_argument("--muon_rate", type=float, help="default: the best of the sweep")
    race.add_argument("--muon_decay", type=float, help="default: the best of the sweep")

    dtypes = modes.add_parser("dtypes", parents=[shards])
    dtypes.add_argument("--steps", type=int, default=3000)
    dtypes.add_argument("--evals", type=int, default=10, help="of a run")
    dtypes.add_argument("--dtypes", nargs="+", default=["bfloat16", "fp8"])
    dtypes.add_argument("--rate", type=float, default=6e-4)
    dtypes.add_argument("--decay", type=float, default=0.1)

    finetune = modes.add_parser("finetune", parents=[common])
    finetune.add_argument("data", type=Path, nargs="+", help="text files in UTF-8")
    finetune.add_argument("--init_from", type=Path, required=True, help="run of the race")
    finetune.add_argument("--share", type=float, default=0.1, help="of auto's steps to fine-tune")

    flags: list[str] = []
    if "--" in args:
        args, flags = args[: args.index("--")], list(args[args.index("--") + 1 :])
    options = parser.parse_args(args)
    options.runs = options.runs or options.out / "runs"
    options.flags = flags
    return options


def main() -> None:
    options = parse_options(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    results = read_results(options.out)
    make_trials: dict[str, Callable[[], list[Trial]]] = {
        "sweep": lambda: sweep_trials(options),
        "race": lambda: race_trials(options, results),
        "dtypes": lambda: dtype_trials(options),
        "finetune": lambda: finetune_trials(options),
    }
    try:
        trials = make_trials[options.mode]()
    except UserError as error:
        sys.exit(f"error: {error}")
    inputs = [options.data] * len(trials)
    if options.mode == "finetune":
        inputs = [text for text in options.data for _ in range(len(trials) // len(options.data))]
    runner, code = Runner(options, results), 0

    def stop(number: int, frame: object) -> None:
        raise Stop(number)

    if not options.table:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, options.budget_s)
        try:
            runner.run(trials, inputs)
            code = int(runner.failed)
        except Stop as reason:
            code = 0 if reason.args[0] == signal.SIGALRM else 143
        except KeyboardInterrupt:
            code = 130
        signal.setitimer(signal.ITIMER_REAL, 0)
    found = [result for trial in trials if (result := find(results, trial))]
    if options.mode == "sweep":
        found.sort(key=lambda r: (optimizer_of(r)[0], r["val_loss"] or float("inf")))
    print(f"\n{len(found)} of {len(trials)} runs have results.\n\n{table(found)}")
    if found:
        draw(found, options.out / f"{options.mode}.png")
        if len(found) == len(trials):
            print(f"\n{verdict(found)}")
    sys.exit(code)


if __name__ == "__main__":
    main()
