"""Build a Trainer from a Config: check, select and log all that a run needs."""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from gptforge import files
from gptforge.builders.build_train_step import build_train_step, estimate_duration
from gptforge.builders.memory_fit import check_fits_memory
from gptforge.builders.resolve_run import ResolvedRun, open_run_dir, resolve_run
from gptforge.builders.start_report import config_toml, describe_dataset, start_report
from gptforge.builders.step_timing import fit_time_limit
from gptforge.builders.teachers import load_teachers, teacher_configs
from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.checkpoint.format import CONFIG
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.config_checks import unused_fields
from gptforge.data.dataloader import DataLoader
from gptforge.device import seed_everything
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.estimate.formulas import checkpoint_bytes
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.lock import FolderLock
from gptforge.optim.schedule import stable_end
from gptforge.presets import AUTO, PRESETS, get_preset
from gptforge.printable import pluralize
from gptforge.report.log_handler import RESULT
from gptforge.shell import Start, quote, same_command, shown
from gptforge.tokenizers.base import byte_lengths, char_lengths
from gptforge.training.distillation import Distillation
from gptforge.training.loss_monitor import LossMonitor
from gptforge.training.signals import StopReason, StopSignal, agree_on_signal
from gptforge.training.state import TrainState, resolve_patience, restore
from gptforge.training.timer import StepTimer
from gptforge.training.trainer import Trainer

logger = logging.getLogger(__name__)

TrainFn = Callable[[Trainer], StopReason]
"""Trains to the last step, or until training is stopped."""


def build_trainer(
    config: Config,
    *,
    explicit: Collection[str],
    start: Start | None = None,
    comm: Comm = SINGLE_PROCESS,
    train_teacher: TrainFn = lambda trainer: trainer.fit(),
) -> Trainer | StopReason:
    """Build all parts of a run, unless there is nothing to train.

    All ranks build, and rank 0 alone opens the run folder. The teachers of a new run are built
    before, in runs of their own.

    Args:
        config: as merged from preset, file and flags; `explicit` are the fields that the user set.
        start: how the run was started; by default from Python, now.
        train_teacher: trains the teacher that it is called with.

    Returns:
        The trainer; else "finished" if the run in the run folder is, or why a teacher was stopped,
        which is saved: the same command resumes it.

    Raises:
        UserError: for a configuration, text or run folder that cannot be trained.
        RunError: if the disk has no room for a checkpoint.
    """
    run = resolve_run(config, explicit, comm, start=start)
    with contextlib.ExitStack() as on_failure:
        opened, lock = open_run_dir(run, on_failure, requested=config)
        run = dataclasses.replace(run, config=opened.config)
        _log_notes(run, opened)
        if opened.status == "finished":
            _log_finished(opened, run.start.program)
            return "finished"
        if opened.status == "new":
            run = fit_time_limit(run)
        c, device = run.config, run.device
        logger.info(f"text: {describe_dataset(run.dataset, c)}")
        logger.info(
            f"device: {device} ({run.device_description}), {run.precision.name}: "
            f"{run.precision.reason}"
        )
        patience = resolve_patience(
            c, train_tokens=len(run.dataset.train), has_val=len(run.dataset.val) > 0
        )
        if patience:
            counted = "" if stable_end(c) is None else ", counted from the decay on"
            evaluations = pluralize(patience, "evaluation")
            logger.info(
                f"early stopping: after {evaluations} without a better held-out loss{counted}; "
                "--patience 0 turns it off"
            )
        if comm.is_main:
            _open_store(c).check_disk_space(checkpoint_bytes(c))
        if comm.world_size == 1:
            check_fits_memory(c, device, run.precision, is_explicit="batch_size" in explicit)
        # One for the teachers and the student: it handles signals between them, too.
        stop_signal = StopSignal(c.time_limit, started=run.start.time)
        distillation = None
        if c.teachers:
            opened = _move_old_run(opened, lock)
            if opened.status == "new":
                reason = _build_teachers(run, stop_signal, train_teacher)
                if reason != "finished":
                    return reason
            distillation = load_teachers(c, device, comm)
        trainer = _assemble(
            run, opened, lock, stop_signal, patience=patience, distillation=distillation
        )
        on_failure.pop_all()
        return trainer


def _build_teachers(run: ResolvedRun, stop_signal: StopSignal, train: TrainFn) -> StopReason:
    """Build and train those teachers of a student that are not finished, until one is stopped."""
    c, comm = run.config, run.comm

    def save_config_and_train(trainer: Trainer) -> StopReason:
        # A run that is stopped in a teacher resumes with these values, which no teacher refused.
        if comm.is_main:
            files.atomic_write(Path(c.out_dir) / CONFIG, config_toml(run))
        return train(trainer)

    for number, teacher in enumerate(teacher_configs(c, run.explicit, comm), 1):
        logger.info(f"teacher {number} of {c.teachers}: {teacher.out_dir}")
        teacher_run = dataclasses.replace(run, config=teacher)
        reason = _build_teacher(teacher_run, stop_signal, save_config_and_train)
        if reason != "finished":
            return reason
    seed_everything(c, rank=comm.rank)  # as without teachers
    teachers = pluralize(c.teachers, "teacher")
    logger.info(f"student of {teachers}: {c.out_dir}; the logged loss is that of the text alone")
    return "finished"


def _build_teacher(run: ResolvedRun, stop_signal: StopSignal, train: TrainFn) -> StopReason:
    """Build a teacher, unless it is finished, and train it; `run` has its configuration."""
    seed_everything(run.config, rank=run.comm.rank)
    with contextlib.ExitStack() as on_exit:
        opened, lock = open_run_dir(run, on_exit, requested=run.config)
        for notice in opened.notices:
            logger.info(f"note: {notice}")
        if opened.status == "finished":
            logger.info(f"{run.config.out_dir} is finished")
            return "finished"
        run = dataclasses.replace(run, config=opened.config)
        trainer = _assemble(run, opened, lock, stop_signal, is_teacher=True)
        # A signal must not raise KeyboardInterrupt while objects are freed: it would be lost.
        with stop_signal:
            try:
                reason = train(trainer)
            finally:
                trainer.close()
            del trainer
            gc.collect()  # frees its CUDA graphs before the next model is built
    return agree_on_signal(stop_signal, run.comm) or reason


def _assemble(
    run: ResolvedRun,
    opened: OpenedRun,
    lock: FolderLock | None,
    stop_signal: StopSignal,
    *,
    patience: int = 0,
    distillation: Distillation | None = None,
    is_teacher: bool = False,
) -> Trainer:
    """Build the parts of an opened run, and write its first files.

    With `is_teacher`, another run learns from this one, which reports only steps and losses.
    """
    c, dataset, device, comm = run.config, run.dataset, run.device, run.comm
    step_fn = build_train_step(
        c, device, run.precision, explicit=run.explicit, comm=comm,
        is_resumed=opened.checkpoint is not None, wait_for_warmup=run.wait_for_warmup,
        distillation=distillation,
    )  # fmt: skip
    with contextlib.ExitStack() as on_failure:
        dataloader = DataLoader(
            dataset.train, context_length=c.context_length, global_batch_size=c.global_batch_size,
            seed=c.seed, shuffle=c.shuffle, random_offset=c.random_offset, device=device,
            rank=comm.rank, world_size=comm.world_size,
        )  # fmt: skip
        on_failure.callback(dataloader.close)
        state = TrainState()
        if opened.checkpoint is not None:
            state = restore(opened.checkpoint, step_fn, dataloader, comm)
            state = dataclasses.replace(state, **opened.counters)
        evaluator = None
        if len(dataset.val):
            evaluator = ValEvaluator(
                dataset.val,
                byte_lengths(dataset.tokenizer),
                char_lengths=char_lengths(dataset.tokenizer),
                context_length=c.context_length,
                batch_size=step_fn.micro_batch_size,
                max_tokens=c.eval_tokens,
            )
        val_tokens = evaluator.num_tokens if evaluator else 0
        steps = c.max_steps - state.step
        logger.info(estimate_duration(step_fn, c, steps=steps, val_tokens=val_tokens, comm=comm))
        # The run folder changes from here on: all errors that can be found have been found.
        opened = _move_old_run(opened, lock)
        report = start_report(run, opened, step_fn, state, is_teacher=is_teacher)
        store = _open_store(c)
        if comm.is_main and opened.drops_decay:
            store.discard_after(state.step, "decayed")
        # Losses are read two steps late on a GPU, so that no step waits for the device.
        lag = 2 if device.type == "cuda" else 0
        trainer = Trainer(
            config=c,
            step_fn=step_fn,
            dataloader=dataloader,
            val_evaluator=evaluator,
            tokenizer=dataset.tokenizer,
            saver=AsyncSaver(
                store,
                tokenizer=dataset.tokenizer,
                config=config_toml(run),
                keep=c.keep_checkpoints,
                protected_steps={*c.early_steps, stable_end(c)},
                enabled=comm.is_main,
            ),
            report=report,
            stop_signal=stop_signal,
            loss_monitor=LossMonitor(lag=lag, uses_grad_scaler=run.precision.needs_scaler),
            patience=patience,
            text_sha256=dataset.sha256,
            file_fingerprints={
                "inputs": sorted(dataset.input_fingerprints("train")),
                "val_inputs": sorted(dataset.input_fingerprints("val")),
            },
            state=state,
            lock=lock,
            comm=comm,
            stop_consensus=comm.async_max(lag),
            timer=StepTimer(device, comm),
        )
        on_failure.pop_all()
        return trainer


def _open_store(config: Config) -> CheckpointStore:
    folder = Path(config.out_dir).absolute() / "checkpoints"
    return CheckpointStore(folder, resume_command=same_command(restart=config.restart))


def _log_notes(run: ResolvedRun, opened: OpenedRun) -> None:
    notes = [*(() if run.is_new_text else run.dataset.notices), *opened.notices]
    c = run.config
    if opened.status == "new" and c.preset in PRESETS and c.preset != AUTO:
        usual = get_preset(c.preset).warmup_steps
        if c.warmup_steps < usual and "warmup_steps" not in run.explicit:
            notes.append(f"the preset's warmup of {usual} steps is cut to {c.warmup_steps}")
    notes += [f"--{name} has no effect {when}" for name, when in unused_fields(c, run.explicit)]
    for note in notes:
        logger.info(f"note: {note}")


def _log_finished(opened: OpenedRun, program: str) -> None:
    config, progress = opened.config, opened.state["progress"]
    reason = f"{config.max_steps} steps are done. Raise --max_steps"
    if progress["step"] < config.max_steps:
        reason = (
            f"it stopped early at step {progress['step']} of {config.max_steps}, with no better "
            f"held-out loss since step {progress['best_step']}. Give --patience 0 or raise "
            "--max_steps"
        )
    logger.log(
        RESULT,
        f"{config.out_dir} is finished: {reason} to train on, --restart to start over, or try the "
        f"model: {program} sample {quote(config.out_dir)}",
    )


def _move_old_run(opened: OpenedRun, lock: FolderLock | None) -> OpenedRun:
    """Move a run that `--restart` replaces to a backup, on rank 0, which has the lock."""
    if opened.moves_old_run and lock is not None:
        backup = lock.move_to_backup("old")
        logger.info(f"note: moved the old {shown(lock.folder)} to {shown(backup)}")
    return dataclasses.replace(opened, moves_old_run=False)
