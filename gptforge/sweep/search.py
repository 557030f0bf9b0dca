"""A sweep from start to end: prepare the text, run the trials, rank them, train the best one."""

import dataclasses
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptforge import files
from gptforge.builders.resolve import (
    check_tokenizer,
    load_dataset,
    resolve_config,
)
from gptforge.config import Config
from gptforge.data.dataset import DatasetOptions, check_length, open_dataset
from gptforge.data.prepare.workers import num_cpus
from gptforge.errors import RunError, UserError, require_package
from gptforge.lock import FolderLock, lock_folder
from gptforge.report.format import format_duration
from gptforge.report.progress import ProgressMeter
from gptforge.sweep.devices import find_devices, jobs_per_device
from gptforge.sweep.results import (
    RunResult,
    TrialResult,
    read_result,
    trial_result,
    write_results,
)
from gptforge.sweep.scheduler import Process, Run, last_error, run_all, start_process
from gptforge.sweep.space import (
    Space,
    Values,
    describe,
    format_value,
    grid_search,
    random_search,
)
from gptforge.sweep.sweep_dir import DATA, INPUT_FIELDS, RECORD, SweepDir, train_args
from gptforge.sweep.tpe import TPESearch

logger = logging.getLogger(__name__)

FINAL_SEEDS = 3
"""Runs of the best trial on the full training part."""


@dataclass(frozen=True)
class SweepRequest:
    """What to sweep.

    Attributes:
        config: without swept values; `out_dir` is the sweep's folder.
        largest: with the largest ones, for estimates.
        explicit: fields that the user set.
        resolve: gives the configuration of a trial, and which of its fields are set explicitly.
        method: how values are picked from the space.
        space: fields and their values.
        trials: how many, for the methods random and tpe.
        seeds: runs of each trial.
        jobs: runs at a time; 0: as many as fit.
    """

    config: Config
    largest: Config
    explicit: frozenset[str]
    resolve: Callable[[Values], tuple[Config, frozenset[str]]]
    method: Literal["grid", "random", "tpe"]
    space: Space
    trials: int
    seeds: int
    jobs: int


class Sweep:
    """Trains the trials of a request in child processes; a context manager that locks its folder.

    Raises:
        UserError: for a text or folder that cannot be used, before anything runs.
    """

    def __init__(self, request: SweepRequest) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("a sweep starts its own processes: run it without torchrun")
        if request.method == "tpe":
            require_package("optuna", extra="sweep")
        explicit = request.explicit
        config = request.config
        with ProgressMeter("preparing the text") as meter:
            dataset = load_dataset(config, explicit, meter)
        check_tokenizer(config, dataset.tokenizer, prepared_path=dataset.prepared_dir)
        if not len(dataset.val):
            raise UserError(
                "a sweep needs a test tail and a second split: give a --val_fraction above 0"
            )
        self._request = request
        self._val_fraction = dataset.val_fraction
        config = resolve_config(config, dataset)
        path = Path(config.out_dir)
        with ExitStack() as stack:
            stack.enter_context(_lock(path))
            if config.restart and (path / RECORD).exists():
                stack.close()
                backup = files.move_to_backup(path, "old")
                logger.info(f"note: moved the old {path.as_posix()} to {backup.as_posix()}")
                stack.enter_context(_lock(path))
            self.dir = SweepDir(path, config, dataset, request.space)
            options = DatasetOptions(
                tokenizer=self.dir.input_flags["tokenizer"],
                val_fraction=self._val_fraction,
                require_tokenizer=True,
            )
            trial_data = open_dataset(Path(self.dir.input_flags["input"]), options)
            largest = dataclasses.replace(request.largest, vocab_size=config.vocab_size)
            check_length(trial_data, largest.context_length, random_offset=largest.random_offset)
            self._devices = find_devices(config)
            self.jobs = request.jobs or len(self._devices) * jobs_per_device(
                largest, is_explicit="batch_size" in explicit
            )
            self._search: Iterator[Values]
            self._tpe: TPESearch | None = None
            if request.method == "tpe":
                self._tpe = TPESearch(request.space, request.trials, config.seed, path)
                self._search = iter(self._tpe)
            elif request.method == "random":
                self._search = random_search(request.space, request.trials, config.seed)
            else:
                self._search = grid_search(request.space)
            self._stack = stack.pop_all()
        logger.info(
            f"text: {dataset.path.as_posix()}; {len(dataset.val):,} {dataset.tokenizer.name} "
            f"tokens are the test tail, which trials do not read; they train on "
            f"{len(trial_data.train):,} and are compared on {len(trial_data.val):,}"
        )
        self._trials: dict[int, tuple[Values, list[Run]]] = {}
        self._results: dict[Path, RunResult | None] = {}
        self._errors: dict[int, str] = {}
        self._start_times: dict[Path, float] = {}
        self._begin = time.monotonic()
        self._skipped = self._ended = 0
        num_trials = request.trials
        if request.method == "grid":
            num_trials = math.prod(len(dim.values) for dim in request.space.values())
        self._num_runs = num_trials * request.seeds

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> list[TrialResult]:
        """Run all trials that are not finished; returns them with the best first."""
        run_all(self._batches(), jobs=self.jobs, start=self._start, on_end=self._end)
        return self.results()

    def results(self) -> list[TrialResult]:
        """The trials so far, best first."""
        results = [
            trial_result(
                number,
                values,
                {run.seed: self._results.get(run.folder) for run in runs},
                error=self._errors.get(number, ""),
            )
            for number, (values, runs) in self._trials.items()
        ]
        return sorted(results, key=lambda result: (result.loss, result.trial))

    def run_final(self, best: TrialResult) -> TrialResult:
        """Train a trial on the full training part, and evaluate it on the test tail.

        The step is the trial's, so nothing is chosen on the tail, and so are not the seeds: no
        trial had them.

        Raises:
            RunError: if a run fails.
        """
        first = self._request.config.seed + self._request.seeds
        # The first evaluation is the one that counts; later ones only choose the checkpoint.
        flags = {"eval_every": str(best.step), "eval_tokens": "0", "patience": "0"}
        config, explicit = self._request.resolve(best.values)
        runs = []
        for seed in range(first, first + FINAL_SEEDS):
            folder = self.dir.path / f"final-trial-{best.trial:04d}-seed-{seed}"
            args = train_args(config, explicit, flags, _run_flags(folder, seed))
            runs.append(Run(best.trial, seed, folder, tuple(args)))
        todo = [run for run in runs if read_result(run.folder) is None]
        run_all([todo], jobs=self.jobs, start=self._start, on_end=self._log_end)
        results = {}
        for run in runs:
            result = read_result(run.folder)
            if result is None or best.step not in result.evals:
                raise RunError(
                    f"{run.folder.as_posix()} did not finish: see {run.log.as_posix()}, and give "
                    "the same command again"
                )
            results[run.seed] = result
        at_step = [result.evals[best.step] for result in results.values()]
        return dataclasses.replace(
            best,
            seeds=tuple(results),
            losses=tuple(loss for loss, _ in at_step),
            bits_per_byte=statistics.fmean(bits for _, bits in at_step),
            seconds=statistics.fmean(result.seconds for result in results.values()),
        )

    def _batches(self) -> Iterator[Sequence[Run]]:
        for values in self._search:
            number = self.dir.number(values)
            runs = self._runs(number, values)
            self._trials[number] = values, runs
            for run in runs:
                self._results[run.folder] = read_result(run.folder)
            todo = [run for run in runs if self._results[run.folder] is None]
            if len(todo) < len(runs):
                logger.info(f"trial {number}: {len(runs) - len(todo)} of {len(runs)} finished")
                self._skipped += len(runs) - len(todo)
            self._report_if_done(number)
            yield todo

    def _runs(self, number: int, values: Values) -> list[Run]:
        config, explicit = self._request.resolve(values)
        explicit -= INPUT_FIELDS
        flags = {**self.dir.input_flags, "val_fraction": format_value(self._val_fraction)}
        if "keep_checkpoints" not in explicit:
            flags["keep_checkpoints"] = "0"  # best and last are kept in any case
        runs = []
        first = config.seed
        for seed in range(first, first + self._request.seeds):
            suffix = "" if seed == first else f"-seed-{seed}"
            folder = self.dir.path / f"trial-{number:04d}{suffix}"
            args = train_args(config, explicit, flags, _run_flags(folder, seed))
            runs.append(Run(number, seed, folder, tuple(args)))
        return runs

    def _start(self, run: Run, slot: int) -> Process:
        values, _ = self._trials[run.trial]
        logger.info(f"{run.folder.name}: {describe(values)}")
        env = dict(os.environ)
        if self.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // self.jobs)))
        root = Path(__file__).parents[2]  # found without an installation, too
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
        device = self._devices[slot % len(self._devices)]
        command = [sys.executable, "-m", "gptforge", "train", f"--device={device}"]
        self._start_times[run.folder] = time.monotonic()
        return start_process(run, command, env)

    def _log_end(self, run: Run, code: int) -> str:
        """Log how a run ended; returns the error, or an empty string."""
        seconds = format_duration(time.monotonic() - self._start_times[run.folder])
        result = read_result(run.folder)
        if result is None:
            error = last_error(run, code)
            logger.warning(
                f"{run.folder.name}: failed after {seconds}: {error} (see {run.log.as_posix()})"
            )
            return error
        (loss, _), step = min((loss, step) for step, loss in result.evals.items())
        logger.info(f"{run.folder.name}: loss {loss:.4f} at step {step:,}, in {seconds}")
        return ""

    def _end(self, run: Run, code: int) -> None:
        error = self._log_end(run, code)
        self._results[run.folder] = read_result(run.folder)
        if error:
            self._errors[run.trial] = error
        self._ended += 1
        if left := self._num_runs - self._skipped - self._ended:
            elapsed = time.monotonic() - self._begin
            logger.info(
                f"{left} of {self._num_runs} runs left, about "
                f"{format_duration(elapsed / self._ended * left)}"
            )
        self._report_if_done(run.trial)
        write_results(self.dir.path, self.results())

    def _report_if_done(self, number: int) -> None:
        """Tell the search the loss of a trial when all its runs have ended."""
        values, runs = self._trials[number]
        results = {run.seed: self._results[run.folder] for run in runs}
        has_failed = number in self._errors
        if self._tpe is not None and (has_failed or None not in results.values()):
            losses = trial_result(number, values, results).losses
            self._tpe.report(values, None if has_failed or not losses else statistics.fmean(losses))


def _run_flags(folder: Path, seed: int) -> Mapping[str, str]:
    return {"out_dir": folder.as_posix(), "seed": str(seed)}


def _lock(path: Path) -> FolderLock:
    # Not the folder itself: a run in a locked folder would be refused.
    lock = lock_folder(path / DATA)
    if lock is None:
        raise UserError(f"{path.as_posix()} is in use by another sweep: wait for it")
    return lock
