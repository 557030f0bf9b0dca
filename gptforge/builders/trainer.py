"""From a Config to a Trainer: everything a run needs, checked, chosen and said."""

import contextlib
import dataclasses
import os
import platform
import time
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import __version__, files
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.memory_fit import check_fits_memory
from gptforge.builders.parallel import check_global_batch, open_run_on_all_ranks
from gptforge.builders.resolve import (
    check_tokenizer,
    describe_dataset,
    load_dataset,
    resolve_config,
    resolve_init_from,
    resolve_out_dir,
)
from gptforge.builders.train_step import attention_backend, build_train_step, estimate_duration
from gptforge.checkpoint import store as checkpoints
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
    SEED_LIMIT,
    Config,
    to_toml,
    validate,
)
from gptforge.data.dataloader import DataLoader
from gptforge.data.dataset import Dataset
from gptforge.device import select_device, select_precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.estimate import formulas
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.lock import FolderLock
from gptforge.model import GPT
from gptforge.presets import PRESETS, get_preset
from gptforge.report.console import Console
from gptforge.report.progress import ProgressMeter
from gptforge.report.run_report import RunReport
from gptforge.report.summary import model_summary
from gptforge.shell import quote
from gptforge.tokenizers import byte_lengths
from gptforge.train.loss_monitor import LossMonitor
from gptforge.train.signals import StopSignal
from gptforge.train.state import TrainState, restore
from gptforge.train.train_step import TrainStep
from gptforge.train.trainer import Trainer

Say = Callable[[str], None]


def build_trainer(
    config: Config,
    *,
    explicit: Collection[str],
    log: Say,
    program: str = "python gpt.py",
    command: str = "",
    comm: Comm = SINGLE_PROCESS,
    start_time: float | None = None,
) -> Trainer | None:
    """Everything a run needs, checked and ready; None if the run in that folder is finished.

    Args:
        config: as merged from preset, file and flags.
        given: fields set by hand, in the file or by flags.
        say: told each choice, with its reason, as it is made.
        program: how the program is called, for the commands that it prints.
        command: its arguments, for the log.
        ranks: who trains together; all of them build, rank 0 alone looks into the run folder.
        started: `time.monotonic()` when the time limit began to count; by default now.

    Raises:
        UserError: for anything the user can mend.
        RunError: if the disk has no room for a checkpoint.
    """
    start_time = time.monotonic() if start_time is None else start_time
    asked = config
    config = Config(
        **comm.broadcast_from_rank0(lambda: vars(resolve_init_from(asked, explicit, log)))
    )
    validate(config)
    if comm.is_main:
        check_out_dir(dataclasses.replace(config, out_dir=resolve_out_dir(config)))
    check_global_batch(config, comm)
    device, device_note = select_device(comm.local_device or config.device)
    precision = select_precision(config.dtype, device)
    seed_everything(config, rank=comm.rank)
    # Behind what cuBLAS reads when it starts.
    warm_up = KernelWarmup(device, config, precision)
    # What one has prepared, the others of its machine find.
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        log(text)

    with comm.local_main_process_first(), ProgressMeter("preparing the text") as meter:
        corpus = load_dataset(config, explicit, tell, meter)
    comm.broadcast_from_rank0(
        lambda: check_tokenizer(config, corpus.tokenizer, prepared_path=corpus.prepared_dir)
    )
    config = resolve_config(config, corpus)
    is_read_only = is_finished_read_only(Path(config.out_dir))
    lock = lock_run_dir(Path(config.out_dir)) if comm.is_main and not is_read_only else None
    with contextlib.ExitStack() as unless_built:
        if lock is not None:
            unless_built.callback(lock.release)
        opening = open_run_on_all_ranks(config, corpus, explicit, comm, requested=asked)
        config = opening.config
        for notice in (*corpus.notices, *opening.notices):
            # What was prepared just now has been told of.
            if (text := f"note: {notice}") not in told:
                log(text)
        usual = get_preset(config.preset).warmup_steps if config.preset in PRESETS else 0
        if (
            opening.status == "new"
            and "warmup_steps" not in explicit
            and config.warmup_steps < usual
        ):
            log(f"note: the preset's warmup of {usual} steps is cut to {config.warmup_steps}")
        if opening.status == "finished":
            log(_finished(config, program))
            return None

        log(f"text: {describe_dataset(corpus, config)}")
        log(f"device: {device} ({device_note}), {precision.name}: {precision.reason}")
        store = CheckpointStore(
            Path(config.out_dir) / "checkpoints",
            resume_command="the same command without --overwrite"
            if config.restart
            else "the same command",
        )
        if comm.is_main:
            store.check_disk_space(formulas.checkpoint_bytes(config.model))
        if comm.world_size == 1:
            check_fits_memory(config, device, precision, is_explicit="batch_size" in explicit)
        step = build_train_step(
            config,
            opening,
            device,
            precision,
            explicit=explicit,
            log=log,
            comm=comm,
            wait_for_warmup=warm_up.wait,
        )
        loader = DataLoader(
            corpus.train,
            context_length=config.context_length,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            shuffle=config.shuffle,
            random_offset=config.random_offset,
            device=device,
            rank=comm.rank,
            world_size=comm.world_size,
        )
        progress = TrainState()
        if opening.checkpoint is not None:
            progress = restore(opening.checkpoint, step, loader, comm)
        held_out = _held_out(corpus, config, batch_size=step.micro_batch_size)
        left, judged = config.max_steps - progress.step, held_out.num_tokens if held_out else 0
        log(estimate_duration(step, config, steps=left, val_tokens=judged, comm=comm))

        whole_command = f"{program} {command}".strip()
        config_text = to_toml(config, {**_versions(), "command": whole_command})
        report = RunReport(
            Path(config.out_dir),
            title=f"{config.preset or 'GPT-2'} on {corpus.path.name}",
            program=program,
            split_hint=corpus.split_hint,
            enabled=comm.is_main,
        )
        if comm.is_main:
            _open_report(
                report, lock, config, opening, step, progress, comm, config_text=config_text
            )
        lag = 2 if device.type == "cuda" else 0
        trainer = Trainer(
            config=config,
            step_fn=step,
            dataloader=loader,
            val_evaluator=held_out,
            tokenizer=corpus.tokenizer,
            saver=AsyncSaver(
                store,
                tokenizer=corpus.tokenizer,
                config=config_text,
                keep=config.keep_checkpoints,
                enabled=comm.is_main,
            ),
            report=report,
            stop_signal=StopSignal(config.time_limit, log=report.log, started=start_time),
            # A GPU works behind our backs: two steps later its numbers are ready to be read.
            loss_monitor=LossMonitor(lag=lag, uses_grad_scaler=precision.needs_scaler),
            text_sha256=corpus.sha256,
            inputs=sorted(corpus.input_fingerprints("train")),
            state=progress,
            lock=lock,
            comm=comm,
            stop_consensus=comm.async_max(lag),
        )
        unless_built.pop_all()
        return trainer


def seed_everything(config: Config, *, rank: int = 0) -> None:
    """Dice, and which kinds of products are let in, before anything is built."""
    # Ranks that dropped the same activations would learn less from their parts.
    torch.manual_seed((config.seed + rank * 0x9E3779B97F4A7C15) % SEED_LIMIT)
    # TF32 where weights stay float32: what "mixed precision" leaves behind is fast as well.
    torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # cuBLAS reads this when it starts, and torch insists on it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _open_report(
    report: RunReport,
    lock: FolderLock | None,
    config: Config,
    opening: OpenedRun,
    step: TrainStep,
    progress: TrainState,
    ranks: Comm,
    *,
    config_text: str,
) -> None:
    """Make the run folder, or cut it back to where the run goes on.

    The first change that a start makes: whatever could be wrong has been found by now.
    """
    folder = report.run_dir
    if opening.moves_old_run:
        assert lock is not None, "a folder that cannot be written to is not moved"
        aside = lock.move_to_backup("old")
        report.console.log(f"note: moved the old {folder.as_posix()} to {aside.as_posix()}")
    folder.mkdir(parents=True, exist_ok=True)
    if opening.status == "new":
        report.delete_logs()
    files.atomic_write(folder / checkpoints.CONFIG, config_text)
    command = tomllib.loads(config_text)[METADATA_TABLE]["command"]
    if opening.checkpoint is None:
        facts = {
            "parameters": formulas.num_params(config.model),
            "device": str(step.device),
            "dtype": step.precision.name,
            "compiled": step.is_compiled,
            "attention": attention_backend(step, config),
            "micro_batch": step.micro_batch_size,
            "ranks": ranks.world_size,
            **_versions(),
        }
        # As it is before anything is wrapped around it.
        with torch.device("meta"):
            summary = model_summary(GPT(config.model))
        report.start(summary, command=command, facts=facts)
    else:
        sizes, name = opening.state["file_sizes"], opening.checkpoint.name
        is_best = progress.best_step == progress.step
        report.resume(progress.step, sizes, checkpoint=name, is_best=is_best, command=command)
        report.console.log(f"going on from {name}: step {progress.step} of {config.max_steps}")
    report.console = Console(config.max_steps, progress.step)


def _versions() -> dict[str, str]:
    return {
        "gptforge": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _held_out(corpus: Dataset, config: Config, *, batch_size: int) -> ValEvaluator | None:
    if len(corpus.val) == 0:
        return None
    return ValEvaluator(
        corpus.val,
        byte_lengths(corpus.tokenizer),
        context_length=config.context_length,
        batch_size=batch_size,
        max_tokens=config.eval_tokens,
    )


def _finished(config: Config, program: str) -> str:
    return (
        f"{config.out_dir} is finished: {config.max_steps} steps are made. Raise --max_steps to go "
        f"on, --overwrite to start anew, or try it: {program} sample {quote(config.out_dir)}"
    )
