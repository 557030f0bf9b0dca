"""Resolve all that a run needs before its folder is opened: flags, checkpoint, machine and text.

Presets that follow the text are resolved here, for training and for `gptforge plan` alike: auto and
the shakespeare presets from the size of the text, before it is read, since they choose the
tokenizer; finetune from the number of tokens.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from gptforge.builders.auto_config import resolve_auto
from gptforge.builders.finetune import resolve_finetune
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.rank_agreement import check_global_batch
from gptforge.builders.resolve import (
    check_tokenizer,
    load_dataset,
    resolve_config,
    resolve_init_from,
    resolve_out_dir,
)
from gptforge.builders.seed import seed_everything
from gptforge.builders.train_teachers import check_teachers
from gptforge.checkpoint.out_dir import check_out_dir, check_writable
from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.data.dataset import Dataset
from gptforge.device import Precision, select_device, select_precision
from gptforge.distributed import Comm
from gptforge.errors import require_package
from gptforge.presets import FINETUNE
from gptforge.report.log_handler import WriteHandler
from gptforge.report.progress import ProgressMeter


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration without open fields, and what it was resolved with."""

    config: Config
    explicit: Collection[str]
    """Fields that the user set."""
    comm: Comm
    dataset: Dataset
    device: torch.device
    device_description: str
    precision: Precision
    logged: Collection[str]
    """Notes about the text that are logged already."""
    wait_for_warmup: Callable[[], None]
    """Waits until the kernels are compiled."""
    is_new_text: bool
    """Whether the text was prepared for this run."""


def resolve_run(
    config: Config,
    explicit: Collection[str],
    comm: Comm,
    *,
    temp_dir: Path | None = None,
    is_plan: bool = False,
) -> ResolvedRun:
    """Resolve and check a configuration; all ranks call this, and agree on it.

    Args:
        config: as merged from preset, file and flags.
        explicit: fields that the user set.
        comm: the ranks.
        temp_dir: where a model of `--init_from` is imported without keeping it.
        is_plan: compile no kernels in the background, and do not look into the run folder.

    Raises:
        UserError: for a configuration, text or run folder that cannot be trained.
    """
    device_flag = comm.local_device or config.device

    def resolve_before_text() -> Config:
        resolved = resolve_init_from(config, explicit, temp_dir=temp_dir)
        return resolve_auto(resolved, explicit, device=device_flag, world_size=comm.world_size)

    c = _resolve_on_main(config, comm, resolve_before_text)
    if comm.is_main:
        for tracker in c.trackers:
            require_package(tracker, extra=tracker)
        out_dir = resolve_out_dir(c)
        if is_plan:
            check_writable(Path(out_dir))
        else:
            check_out_dir(dataclasses.replace(c, out_dir=out_dir))
    if c.preset != FINETUNE:  # its batch follows from the text
        check_global_batch(c, comm)
    device, description = select_device(device_flag)
    precision = select_precision(c.dtype, device)
    seed_everything(c, rank=comm.rank)  # sets what cuBLAS reads when the warmup starts it
    warmup = None if is_plan else KernelWarmup(device, c, precision)
    dataset, logged, is_new_text = _load_dataset(c, explicit, comm)
    resolved = resolve_config(c, dataset)
    c = _resolve_on_main(c, comm, lambda: resolve_finetune(resolved, dataset, explicit))
    check_global_batch(c, comm)
    check_teachers(c)
    return ResolvedRun(
        config=c,
        explicit=explicit,
        comm=comm,
        dataset=dataset,
        device=device,
        device_description=description,
        precision=precision,
        logged=logged,
        wait_for_warmup=warmup.wait if warmup else lambda: None,
        is_new_text=is_new_text,
    )


def _resolve_on_main(config: Config, comm: Comm, resolve: Callable[[], Config]) -> Config:
    """What rank 0 resolves, checked, and the same on all ranks."""
    config = dataclasses.replace(config, **comm.broadcast_from_rank0(lambda: vars(resolve())))
    validate(config)
    return config


def _load_dataset(
    config: Config, explicit: Collection[str], comm: Comm
) -> tuple[Dataset, list[str], bool]:
    """Open the text on all ranks; one per machine prepares it.

    Returns:
        The text, what was logged about it, and whether it was prepared now.
    """
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
    return dataset, logged, meter.total > 0
