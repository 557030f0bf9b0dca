"""Resolve all that a run needs, flags, checkpoint, machine and text, and open its folder.

Presets that follow the text are resolved here, for training and for `gptforge plan` alike: auto and
the shakespeare presets from the size of the text, before it is read, since they choose the
tokenizer; finetune from the number of tokens.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from gptforge import __version__
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.resolve import (
    check_tokenizer,
    load_dataset,
    resolve_config,
    resolve_init_from,
    resolve_out_dir,
    warn_if_memorized,
)
from gptforge.builders.teachers import check_teachers
from gptforge.builders.text_presets import resolve_auto, resolve_finetune
from gptforge.checkpoint.out_dir import check_out_dir, check_writable, is_finished_read_only
from gptforge.checkpoint.run_dir import OpenedRun, open_run
from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.data.dataset import Dataset
from gptforge.data.shard_index import json_sha256
from gptforge.device import Precision, seed_everything, select_device, select_precision
from gptforge.distributed import Comm
from gptforge.errors import UserError, require_package
from gptforge.lock import FolderLock, lock_folder
from gptforge.presets import FINETUNE
from gptforge.printable import join_first
from gptforge.report.console import ProgressMeter
from gptforge.shell import Start, env_int


@dataclass(frozen=True)
class ResolvedRun:
    """A configuration without open fields, what it was resolved with, and how it was started."""

    config: Config
    explicit: Collection[str]  # fields that the user set
    comm: Comm
    dataset: Dataset
    device: torch.device
    device_description: str
    precision: Precision
    wait_for_warmup: Callable[[], None]  # waits until the kernels are compiled
    is_new_text: bool  # whether the text was prepared for this run, which logged its notices
    start: Start


def resolve_run(
    config: Config,
    explicit: Collection[str],
    comm: Comm,
    *,
    start: Start | None = None,
    temp_dir: Path | None = None,
) -> ResolvedRun:
    """Resolve and check a configuration; all ranks call this, and agree on it.

    Args:
        config: as merged from preset, file and flags; `explicit` are the fields that the user set.
        start: see `build_trainer`.
        temp_dir: for a plan, where a model of `--init_from` is imported without keeping it. A plan
            compiles no kernels in the background, and does not look into the run folder.

    Raises:
        UserError: for a configuration, text or run folder that cannot be trained.
    """
    start = start or Start()
    device_flag = comm.local_device or config.device

    def resolve_before_text() -> Config:
        resolved = resolve_init_from(config, explicit, temp_dir=temp_dir)
        return resolve_auto(resolved, explicit, device=device_flag, world_size=comm.world_size)

    c = _resolve_on_main(config, comm, resolve_before_text)
    if comm.is_main:
        for tracker in c.trackers:
            require_package(tracker, extra=tracker)
        out_dir = resolve_out_dir(c)
        if temp_dir:
            check_writable(Path(out_dir))
        else:
            check_out_dir(dataclasses.replace(c, out_dir=out_dir))
    if c.preset != FINETUNE:  # its batch follows from the text
        check_global_batch(c, comm)
    device, description = select_device(device_flag)
    precision = select_precision(c.dtype, device)
    seed_everything(c, rank=comm.rank)  # sets what cuBLAS reads when the warmup starts it
    warmup = None if temp_dir else KernelWarmup(device, c, precision)
    dataset, is_new_text = _load_dataset(c, explicit, comm)
    resolved = resolve_config(c, dataset, explicit)
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
        wait_for_warmup=warmup.wait if warmup else lambda: None,
        is_new_text=is_new_text,
        start=start,
    )


def _resolve_on_main(config: Config, comm: Comm, resolve: Callable[[], Config]) -> Config:
    """What rank 0 resolves, checked, and the same on all ranks."""
    config = dataclasses.replace(config, **comm.broadcast_from_rank0(lambda: vars(resolve())))
    validate(config)
    return config


def _load_dataset(config: Config, explicit: Collection[str], comm: Comm) -> tuple[Dataset, bool]:
    """Open the text on all ranks; one per machine prepares it. Also whether it was prepared now."""
    with comm.local_main_process_first(), ProgressMeter("preparing the text") as meter:
        dataset = load_dataset(config, explicit, meter)

    def check() -> None:
        check_tokenizer(config, dataset.tokenizer, prepared_path=dataset.prepared_dir)
        warn_if_memorized(config, dataset)

    comm.broadcast_from_rank0(check)
    return dataset, meter.total > 0


def check_global_batch(config: Config, comm: Comm) -> None:
    """Raise a UserError unless the global batch divides evenly over the ranks."""
    global_batch, ranks = config.global_batch_size, comm.world_size
    if global_batch % ranks == 0:
        return
    accumulation = config.gradient_accumulation_steps
    unit = ranks // math.gcd(ranks, config.batch_size)
    suggested = max(unit, round(accumulation / unit) * unit)
    divisors = [str(n) for n in range(2, global_batch + 1) if global_batch % n == 0]
    raise UserError(
        f"--batch_size {config.batch_size} x --gradient_accumulation_steps {accumulation} is a "
        f"global batch of {global_batch} sequences, which does not divide by {ranks} ranks: use "
        f"{join_first(divisors, 8) or '1'} ranks, or, unless you resume a run, "
        f"--gradient_accumulation_steps {suggested}"
    )


def open_run_dir(
    run: ResolvedRun, on_failure: contextlib.ExitStack, *, requested: Config
) -> tuple[OpenedRun, FolderLock | None]:
    """Lock the run folder on rank 0, and tell all ranks what is there.

    `on_failure` gets the release of the lock. `requested` is the configuration of the command.

    Raises:
        RunError: naming a rank with another text, tokenizer, `requested` configuration or version.
    """
    config, explicit, comm = run.config, run.explicit, run.comm
    folder, lock = Path(config.out_dir), None
    if comm.is_main and not is_finished_read_only(folder):
        lock = lock_folder(folder)
        if lock is None:
            raise UserError(
                f"{folder.as_posix()} is being trained by another process: wait for it, or choose "
                "another --out_dir"
            )
        on_failure.callback(lock.release)
    if env_int("TORCHELASTIC_RESTART_COUNT", 0):
        # A restarted worker resumes what the first start began.
        config = dataclasses.replace(config, restart=False)

    tokenizer, text_sha256 = run.dataset.tokenizer, run.dataset.sha256
    record = comm.broadcast_from_rank0(
        lambda: open_run(
            config, explicit=explicit, tokenizer=tokenizer, text_sha256=text_sha256
        ).to_json()
    )
    comm.assert_same(
        {
            **{f"--{name}": str(value) for name, value in vars(requested).items()},
            "choice of flags": " ".join(sorted(explicit)) or "none",
            "text (SHA-256)": text_sha256,
            "tokenizer": json_sha256(tokenizer.to_json()),
            "version of gptforge": __version__,
            "version of torch": torch.__version__,
        }
    )
    return OpenedRun.from_json(record), lock
