"""Build a Trainer from a Config: check, select and log all that a run needs."""

import contextlib
import dataclasses
import logging
import platform
import time
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gptforge import __version__, files
from gptforge.builders.auto_config import fit_time_limit, resolve_auto
from gptforge.builders.build_train_step import (
    attention_backend,
    build_train_step,
    estimate_duration,
)
from gptforge.builders.finetune import resolve_finetune
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.memory_fit import check_fits_memory
from gptforge.builders.rank_agreement import check_global_batch, open_run_on_all_ranks
from gptforge.builders.resolve import (
    check_tokenizer,
    describe_dataset,
    load_dataset,
    resolve_config,
    resolve_init_from,
    resolve_out_dir,
)
from gptforge.builders.seed import seed_everything
from gptforge.builders.train_teachers import check_teachers, load_teachers, train_teachers
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.checkpoint.run_dir import (
    OpenedRun,
    check_out_dir,
    is_finished_read_only,
    lock_run_dir,
)
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import (
    METADATA_TABLE,
    Config,
    to_toml,
    validate,
)
from gptforge.data.dataloader import DataLoader
from gptforge.data.dataset import Dataset
from gptforge.device import Precision, select_device, select_precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.estimate.formulas import checkpoint_bytes, num_params
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.lock import FolderLock
from gptforge.model import GPT
from gptforge.optim.schedule import Schedule
from gptforge.presets import AUTO, FINETUNE, PRESETS, get_preset
from gptforge.report.console import Console
from gptforge.report.log_handler import WriteHandler
from gptforge.report.progress import ProgressMeter
from gptforge.report.run_report import RunReport
from gptforge.report.summary import model_summary
from gptforge.shell import quote
from gptforge.tokenizers import byte_lengths, char_lengths
from gptforge.train.early_stop import resolve_patience
from gptforge.train.loss_monitor import LossMonitor
from gptforge.train.signals import StopReason, StopSignal
from gptforge.train.state import TrainState, restore
from gptforge.train.train_step import TrainStep
from gptforge.train.trainer import Trainer

logger = logging.getLogger(__name__)


def build_trainer(
    config: Config,
    *,
    explicit: Collection[str],
    program: str = "python gpt.py",
    command: str = "",
    comm: Comm = SINGLE_PROCESS,
    start_time: float | None = None,
) -> Trainer | None:
    """Build all parts of a run; None if the run in the run folder is finished.

    The teachers of a new run are trained before, in runs of their own.

    Args:
        config: as merged from preset, file and flags.
        explicit: names of the fields that the user set, in the file or by flags.
        program: how the program is called, for the commands that it prints.
        command: the arguments, for the log.
        comm: all ranks; each of them builds, and rank 0 alone opens the run folder.
        start_time: `time.monotonic()` from which the time limit counts; None: now.

    Raises:
        TeacherStopped: if a teacher's training is stopped.
        UserError: for a configuration, text or run folder that cannot be trained.
        RunError: if the disk has no room for a checkpoint.
    """
    start_time = time.monotonic() if start_time is None else start_time
    requested = config

    def train_teacher(teacher: Config) -> StopReason:
        trainer = build_trainer(
            teacher,
            explicit=explicit,
            program=program,
            command=command,
            comm=comm,
            start_time=start_time,
        )
        return trainer.fit() if trainer else "finished"

    device_flag = comm.local_device or config.device

    def resolve_on_main() -> dict[str, Any]:
        config = resolve_init_from(requested, explicit)
        return vars(resolve_auto(config, explicit, device=device_flag, world_size=comm.world_size))

    config = Config(**comm.broadcast_from_rank0(resolve_on_main))
    validate(config)
    if comm.is_main:
        check_out_dir(dataclasses.replace(config, out_dir=resolve_out_dir(config)))
    if config.preset != FINETUNE:  # its batch follows from the text
        check_global_batch(config, comm)
    device, device_description = select_device(device_flag)
    precision = select_precision(config.dtype, device)
    seed_everything(config, rank=comm.rank)  # sets what cuBLAS reads when the warmup starts it
    warmup = KernelWarmup(device, config, precision)
    dataset, logged = _load_dataset(config, explicit, comm)
    config = resolve_config(config, dataset)
    if config.preset == FINETUNE:
        resolved = config
        config = Config(
            **comm.broadcast_from_rank0(lambda: vars(resolve_finetune(resolved, dataset, explicit)))
        )
        validate(config)
        check_global_batch(config, comm)
    check_teachers(config, comm)
    is_read_only = is_finished_read_only(Path(config.out_dir))
    lock = lock_run_dir(Path(config.out_dir)) if comm.is_main and not is_read_only else None
    with contextlib.ExitStack() as on_failure:
        if lock is not None:
            on_failure.callback(lock.release)
        opened = open_run_on_all_ranks(config, dataset, explicit, comm, requested=requested)
        config = opened.config
        _log_notes(dataset, opened, explicit, already_logged=logged)
        if opened.status == "finished":
            logger.info(
                f"{config.out_dir} is finished: {_why_finished(opened)} to train on, --restart to "
                f"start over, or try the model: {program} sample {quote(config.out_dir)}"
            )
            return None
        if opened.status == "new" and config.preset == AUTO and config.time_limit:
            warmup.wait()  # it would slow the steps that are timed
            config = _fit_time_limit(config, explicit, dataset, device, precision, comm, start_time)
        logger.info(f"text: {describe_dataset(dataset, config)}")
        logger.info(
            f"device: {device} ({device_description}), {precision.name}: {precision.reason}"
        )
        has_val = len(dataset.val) > 0
        patience = resolve_patience(config, train_tokens=len(dataset.train), has_val=has_val)
        if patience:
            logger.info(
                f"early stopping: after {patience} evaluations without a better held-out loss; "
                "--patience 0 turns it off"
            )
        store = _open_store(config, comm)
        if comm.world_size == 1:
            check_fits_memory(config, device, precision, is_explicit="batch_size" in explicit)
        distillation = None
        if config.teachers:
            warmup.wait()
            if opened.moves_old_run and lock is not None:
                _move_to_backup(lock)
            opened = dataclasses.replace(opened, moves_old_run=False)
            if opened.status == "new":
                train_teachers(config, train_teacher)
                seed_everything(config, rank=comm.rank)  # as without teachers
            distillation = load_teachers(config, device, comm)
        step = build_train_step(
            config,
            opened,
            device,
            precision,
            explicit=explicit,
            comm=comm,
            wait_for_warmup=warmup.wait,
            distillation=distillation,
        )
        dataloader = _build_dataloader(dataset, config, device, comm)
        state = TrainState()
        if opened.checkpoint is not None:
            state = restore(opened.checkpoint, step, dataloader, comm)
            state = dataclasses.replace(state, **opened.counters)
        evaluator = _build_evaluator(dataset, config, batch_size=step.micro_batch_size)
        val_tokens = evaluator.num_tokens if evaluator else 0
        steps = config.max_steps - state.step
        logger.info(estimate_duration(step, config, steps=steps, val_tokens=val_tokens, comm=comm))
        config_text = to_toml(config, {**_versions(), "command": f"{program} {command}".strip()})
        report = RunReport(
            Path(config.out_dir),
            title=f"{config.preset or 'GPT-2'} on {dataset.path.name}",
            program=program,
            split_hint=dataset.split_hint,
            enabled=comm.is_main,
        )
        if comm.is_main:
            _start_report(report, lock, config, opened, step, state, comm, config_text=config_text)
            if opened.drops_decay:
                store.discard_after(state.step, "decayed")
        # Losses are read two steps late on a GPU, so that no step waits for the device.
        lag = 2 if device.type == "cuda" else 0
        trainer = Trainer(
            config=config,
            step_fn=step,
            dataloader=dataloader,
            val_evaluator=evaluator,
            tokenizer=dataset.tokenizer,
            saver=AsyncSaver(
                store,
                tokenizer=dataset.tokenizer,
                config=config_text,
                keep=config.keep_checkpoints,
                protected_step=Schedule.from_config(config).stable_end,
                enabled=comm.is_main,
            ),
            report=report,
            stop_signal=StopSignal(config.time_limit, started=start_time),
            loss_monitor=LossMonitor(lag=lag, uses_grad_scaler=precision.needs_scaler),
            patience=patience,
            text_sha256=dataset.sha256,
            inputs=sorted(dataset.input_fingerprints("train")),
            state=state,
            lock=lock,
            comm=comm,
            stop_consensus=comm.async_max(lag),
        )
        on_failure.pop_all()
        return trainer


def _load_dataset(
    config: Config, explicit: Collection[str], comm: Comm
) -> tuple[Dataset, list[str]]:
    """Open the text on all ranks; one per machine prepares it. Return what was logged, too."""
    logged: list[str] = []
    recorder = WriteHandler(logged.append)
    data_logger = logging.getLogger("gptforge.data")
    data_logger.addHandler(recorder)
    try:
        with comm.local_main_process_first(), ProgressMeter("preparing the text") as meter:
            dataset = load_dataset(config, explicit, meter)
    finally:
        data_logger.removeHandler(recorder)
    comm.broadcast_from_rank0(
        lambda: check_tokenizer(config, dataset.tokenizer, prepared_path=dataset.prepared_dir)
    )
    return dataset, logged


def _fit_time_limit(
    config: Config,
    explicit: Collection[str],
    dataset: Dataset,
    device: torch.device,
    precision: Precision,
    comm: Comm,
    start_time: float,
) -> Config:
    """Rank 0 times a step, and all ranks make as many as fit."""

    def fit_on_main() -> dict[str, Any]:
        fitted = fit_time_limit(
            config,
            explicit,
            dataset,
            device=device,
            precision=precision,
            start_time=start_time,
            world_size=comm.world_size,
        )
        return vars(fitted)

    fitted = Config(**comm.broadcast_from_rank0(fit_on_main))
    seed_everything(config, rank=comm.rank)  # the steps drew dropout masks
    return fitted


def _log_notes(
    dataset: Dataset,
    opened: OpenedRun,
    explicit: Collection[str],
    *,
    already_logged: Collection[str],
) -> None:
    notes = [f"note: {notice}" for notice in (*dataset.notices, *opened.notices)]
    config = opened.config
    has_usual = config.preset in PRESETS and config.preset != AUTO
    usual = get_preset(config.preset).warmup_steps if has_usual else 0
    is_cut = "warmup_steps" not in explicit and config.warmup_steps < usual
    if opened.status == "new" and is_cut:
        notes.append(f"note: the preset's warmup of {usual} steps is cut to {config.warmup_steps}")
    for note in notes:
        if note not in already_logged:
            logger.info(note)


def _why_finished(opened: OpenedRun) -> str:
    """How a finished run ended, and the flag to raise."""
    config, progress = opened.config, opened.state["progress"]
    if progress["step"] >= config.max_steps:
        return f"{config.max_steps} steps are done. Raise --max_steps"
    return (
        f"it stopped early at step {progress['step']} of {config.max_steps}, with no better "
        f"held-out loss since step {progress['best_step']}. Give --patience 0 or raise --max_steps"
    )


def _build_dataloader(
    dataset: Dataset, config: Config, device: torch.device, comm: Comm
) -> DataLoader:
    return DataLoader(
        dataset.train,
        context_length=config.context_length,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        random_offset=config.random_offset,
        device=device,
        rank=comm.rank,
        world_size=comm.world_size,
    )


def _build_evaluator(dataset: Dataset, config: Config, *, batch_size: int) -> ValEvaluator | None:
    if not len(dataset.val):
        return None
    return ValEvaluator(
        dataset.val,
        byte_lengths(dataset.tokenizer),
        char_lengths=char_lengths(dataset.tokenizer),
        context_length=config.context_length,
        batch_size=batch_size,
        max_tokens=config.eval_tokens,
    )


def _open_store(config: Config, comm: Comm) -> CheckpointStore:
    command = "the same command" + (" without --restart" if config.restart else "")
    store = CheckpointStore(Path(config.out_dir) / "checkpoints", resume_command=command)
    if comm.is_main:
        store.check_disk_space(checkpoint_bytes(config))
    return store


def _start_report(
    report: RunReport,
    lock: FolderLock | None,
    config: Config,
    opened: OpenedRun,
    step: TrainStep,
    state: TrainState,
    comm: Comm,
    *,
    config_text: str,
) -> None:
    """Create the run folder, or truncate the logs to the checkpoint that is resumed.

    This is the first write of a start: all errors that can be found have been found before.
    """
    folder = report.run_dir
    if opened.moves_old_run:
        assert lock is not None, "a read-only folder is not moved"
        _move_to_backup(lock)
    folder.mkdir(parents=True, exist_ok=True)
    if opened.status == "new":
        report.delete_logs()
    files.atomic_write(folder / checkpoints.CONFIG, config_text)
    command = tomllib.loads(config_text)[METADATA_TABLE]["command"]
    if opened.checkpoint is None:
        facts = {
            "parameters": num_params(config.model),
            "device": str(step.device),
            "dtype": step.precision.name,
            "compiled": step.is_compiled,
            "attention": attention_backend(step, config),
            "micro_batch": step.micro_batch_size,
            "ranks": comm.world_size,
            **_versions(),
        }
        # On the meta device: the step's model may be sharded.
        with torch.device("meta"):
            summary = model_summary(GPT(config.model))
        report.start(summary, command=command, facts=facts)
    else:
        name = opened.checkpoint.name
        report.resume(
            state.step,
            opened.state["file_sizes"],
            checkpoint=name,
            is_best=state.best_step == state.step,
            command=command,
        )
        report.console.log(f"Resuming from {name}: step {state.step} of {config.max_steps}")
    report.console = Console(config.max_steps, state.step)


def _move_to_backup(lock: FolderLock) -> None:
    folder = lock.folder.as_posix()
    logger.info(f"note: moved the old {folder} to {lock.move_to_backup('old').as_posix()}")


def _versions() -> dict[str, str]:
    return {
        "gptforge": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
