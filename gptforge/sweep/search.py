"""A sweep from start to end: prepare the text, run the trials, rank them, train the best one."""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from gptforge import files
from gptforge.builders.resolve import check_tokenizer, load_dataset, resolve_config
from gptforge.checkpoint.format import read_config
from gptforge.checkpoint.out_dir import METRICS
from gptforge.config import FIELDS, MAY_CHANGE_ON_RESUME, Config
from gptforge.config_checks import unused_fields
from gptforge.data.dataset import check_length
from gptforge.data.shard_index import json_sha256
from gptforge.errors import RunError, UserError, require_package
from gptforge.lock import FolderLock, lock_folder
from gptforge.report.console import ProgressMeter
from gptforge.report.metrics import read_history
from gptforge.report.run_info import SWEEP_DATA
from gptforge.sweep import scheduler
from gptforge.sweep.results import RunResult, TrialResult, read_result, trial_result, write_results
from gptforge.sweep.scheduler import Run
from gptforge.sweep.space import (
    INPUT_FIELDS,
    Space,
    Values,
    describe,
    format_value,
    grid_search,
    largest,
    optuna_search,
)
from gptforge.sweep.text import prepare_text

logger = logging.getLogger(__name__)

FINAL_SEEDS = 3
"""Runs of the best trial on the full training part."""
COMPARED = {"max_steps", "batch_size", "gradient_accumulation_steps", "eval_every", "patience"}
NOT_COMPARED = (MAY_CHANGE_ON_RESUME - COMPARED) | INPUT_FIELDS
"""Fields in which a sweep may differ from an earlier one whose trials it uses."""
Method = Literal["grid", "random", "tpe"]
Resolve = Callable[[Values], tuple[Config, frozenset[str]]]


class Sweep:
    """Trains trials in child processes; its folder is locked until `close`.

    Args:
        space: fields and their values; `method` picks `trials` of them, grid all.
        resolve: gives the configuration of a trial, and which of its fields are set explicitly;
            `out_dir` is the folder of the sweep.
        explicit, trials, seeds, jobs: fields that the user set, and the sweep's own flags.

    Raises:
        UserError: for a text or folder that cannot be used, before anything runs.
    """

    def __init__(
        self,
        space: Space,
        method: Method,
        resolve: Resolve,
        explicit: frozenset[str],
        *,
        trials: int,
        seeds: int,
        jobs: int,
    ) -> None:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("a sweep starts its own processes: run it without torchrun")
        if method != "grid":
            require_package("optuna", extra="sweep")
        config, _ = resolve({})
        with ProgressMeter("preparing the text") as meter:
            dataset = load_dataset(config, explicit, meter)
        check_tokenizer(config, dataset.tokenizer, prepared_path=dataset.prepared_dir)
        if not len(dataset.val):
            raise UserError(
                "a sweep needs a test split and a second split: give a --val_fraction above 0"
            )
        config = resolve_config(config, dataset, explicit)
        max_config, _ = resolve(largest(space))
        max_config = dataclasses.replace(max_config, vocab_size=config.vocab_size)
        check_length(dataset, max_config.context_length, random_offset=max_config.random_offset)
        self.path = Path(config.out_dir)
        self._lock = _lock(self.path, restart=config.restart)
        try:
            self._text_id, self._input_flags = prepare_text(self.path / SWEEP_DATA, dataset)
        except BaseException:
            self._lock.release()
            raise
        trained, compared = "the first", f"the last {100 * dataset.val_fraction:g}%"
        if Path(self._input_flags["input"]).is_dir():
            trained = "some documents"
            compared = "others, since some are repeated: all copies of one are on the same side"
        logger.info(
            f"text: {dataset.path.as_posix()}; {len(dataset.val):,} {dataset.tokenizer.name} "
            f"tokens are the test split, which trials do not read; of the other "
            f"{len(dataset.train):,}, they train on {trained} and are compared on {compared}"
        )
        self._devices = scheduler.find_devices(config)
        self._jobs = jobs or len(self._devices) * scheduler.jobs_per_device(max_config, explicit)
        self._space, self._method, self._resolve = space, method, resolve
        self._config, self._num_trials, self._num_seeds = config, trials, seeds
        self._trials: dict[str, tuple[Values, list[Run]]] = {}
        self._results: dict[Run, RunResult | None] = {}
        self._errors: dict[str, str] = {}

    def close(self) -> None:
        """Release the folder."""
        self._lock.release()

    def run(self) -> list[TrialResult]:
        """Run all trials that are not finished; returns them with the best first."""
        self._run_all(self._batches())
        list(self._search())  # tells Optuna the losses of the last trials
        write_results(self.path, self.results())
        return self.results()

    def results(self) -> list[TrialResult]:
        """The trials so far, best first.

        Compared on all of the second split, unless that took a run too long.
        """
        use_final = all(r.final for r in self._results.values() if r)
        results = [
            trial_result(
                trial,
                values,
                [self._results[run] for run in runs],
                use_final=use_final,
                error=self._errors.get(trial, ""),
            )
            for trial, (values, runs) in self._trials.items()
        ]
        return sorted(results, key=lambda result: result.loss)

    def run_final(self, best: TrialResult) -> TrialResult:
        """Train a trial on the full training part, and evaluate it on the test split.

        The step is the trial's, so nothing is chosen on the tail, and so are not the seeds: no
        trial had them.

        Raises:
            RunError: if a run fails.
        """
        # The first evaluation is the one that counts; later ones only choose the checkpoint.
        flags = {"eval_every": str(best.step), "eval_tokens": "0", "patience": "0"}
        first = self._config.seed + self._num_seeds
        seeds = range(first, first + FINAL_SEEDS)
        runs = self._runs("final-trial", best.trial, best.values, seeds, flags)
        self._run_all([self._unfinished(runs)])
        results = [self._results[run] for run in runs]
        final = trial_result(best.trial, best.values, results, step=best.step)
        if not final.losses:
            raise RunError(
                f"a final run did not finish: see the logs {self.path.as_posix()}/final-*.log, and "
                "give the same command again"
            )
        return final

    def _search(self) -> Iterator[Values]:
        """Values of each trial; again from the first one with each call."""
        if self._method == "grid":
            return grid_search(self._space)
        study = f"{self._method}-{self._id(self._config, repr(self._space))}"
        return optuna_search(
            self._space,
            self._method,
            seed=self._config.seed,
            trials=self._num_trials,
            study=study,
            folder=self.path,
            losses=self._losses,
        )

    def _id(self, config: Config, searched: object) -> str:
        """A name that differs with all that losses depend on."""
        # Defaults are left out, so that a field of a later version changes no name.
        changed = dict(vars(config).items() - vars(Config()).items())
        fields = {name: value for name, value in changed.items() if name not in NOT_COMPARED}
        return json_sha256([self._text_id, fields, searched])[:8]

    def _losses(self) -> dict[str, float | None]:
        """The loss of each trial that has ended; None if it failed."""
        ended = [result for result in self.results() if result.losses or result.error]
        return {describe(r.values): r.loss if r.losses else None for r in ended}

    def _run_all(self, batches: Iterable[Sequence[Run]]) -> None:
        scheduler.run_all(batches, jobs=self._jobs, start=self._start, on_end=self._end)

    def _batches(self) -> Iterator[Sequence[Run]]:
        first = self._config.seed
        for values in self._search():
            config, _ = self._resolve(values)
            trial = self._id(config, values)
            if trial in self._trials:
                continue
            for name, when in unused_fields(config, values):
                logger.info(f"note: trial {trial}: --{name} has no effect {when}")
            seeds = range(first, first + self._num_seeds)
            runs = self._runs("trial", trial, values, seeds, self._input_flags)
            todo = self._unfinished(runs)
            self._trials[trial] = values, runs
            if len(todo) < len(runs):
                logger.info(f"trial {trial}: {len(runs) - len(todo)} of {len(runs)} runs finished")
            yield todo

    def _runs(
        self, name: str, trial: str, values: Values, seeds: range, flags: Mapping[str, str]
    ) -> list[Run]:
        """A run for each seed; `flags` override those of the trial, empty ones are left out."""
        config, explicit = self._resolve(values)
        args = {"preset": config.preset, "config": config.config}
        args["keep_checkpoints"] = "0"  # best and last are kept in any case
        args |= {name: format_value(getattr(config, name)) for name in FIELDS if name in explicit}
        args |= {**flags, "restart": "", "device": ""}
        runs = []
        for seed in seeds:
            suffix = "" if seed == self._config.seed else f"-seed-{seed}"
            folder = self.path / f"{name}-{trial}{suffix}"
            args |= {"out_dir": folder.as_posix(), "seed": str(seed)}
            flat = tuple(f"--{flag}={value}" for flag, value in args.items() if value)
            runs.append(Run(trial, seed, folder, flat, config.time_limit))
        return runs

    def _unfinished(self, runs: Sequence[Run]) -> list[Run]:
        self._results |= {
            run: None if _may_train_on(run) else read_result(run.folder) for run in runs
        }
        return [run for run in runs if self._results[run] is None]

    def _start(self, run: Run, slot: int) -> scheduler.Process:
        logger.info(f"{run.folder.name}: {describe(self._trials[run.trial][0])}")
        device = self._devices[slot % len(self._devices)]
        return scheduler.start_process(run, device=device, jobs=self._jobs)

    def _end(self, run: Run, code: int) -> None:
        result = self._results[run] = read_result(run.folder)
        if result is None:
            error = self._errors[run.trial] = scheduler.last_error(run, code)
            logger.warning(f"{run.folder.name}: failed: {error} (see {run.log.as_posix()})")
        else:
            score, step = min((score, step) for step, score in result.evals.items())
            loss, _ = result.final or score
            logger.info(f"{run.folder.name}: loss {loss:.4f} nats per token at step {step:,}")
        write_results(self.path, self.results())


def _may_train_on(run: Run) -> bool:
    """Whether a time limit ended a run, and that of the sweep is longer by now."""
    if read_history(run.folder / METRICS).end.get("reason") != "time_limit":
        return False
    return not 0 < run.time_limit <= read_config(run.folder, with_model=False).time_limit


def _lock(path: Path, *, restart: bool) -> FolderLock:
    """Lock the folder of a sweep, moving an old sweep to a backup for `restart`."""
    is_sweep = (path / SWEEP_DATA).is_dir()
    if path.exists() and any(path.iterdir()) and not is_sweep:
        raise UserError(f"{path.as_posix()} is not empty and holds no sweep: use another --out_dir")
    # Not the folder itself: a run in a locked folder would be refused.
    (path / SWEEP_DATA).mkdir(parents=True, exist_ok=True)
    lock = lock_folder(path / SWEEP_DATA)
    if lock is None:
        raise UserError(f"{path.as_posix()} is in use by another sweep: wait for it")
    if not (restart and is_sweep):
        return lock
    lock.release()
    backup = files.move_to_backup(path, "old")
    logger.info(f"note: moved the old {path.as_posix()} to {backup.as_posix()}")
    return _lock(path, restart=False)
