"""Plan a run: resolve and check the configuration as training does, and compute size and cost."""

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

import torch

from gptforge import files
from gptforge.builders.fit_time_limit import fit_time_limit
from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.builders.rank_agreement import use_fsdp
from gptforge.builders.resolve_run import resolve_run
from gptforge.builders.step_timing import time_step
from gptforge.builders.train_teachers import cost_with_teachers
from gptforge.checkpoint.store import HEADROOM_BYTES
from gptforge.config import Config
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset
from gptforge.distributed import SINGLE_PROCESS
from gptforge.errors import RunError
from gptforge.estimate.formulas import (
    checkpoint_bytes,
    flops_per_token,
    num_embedding_params,
    num_params,
)
from gptforge.estimate.plan import (
    MAX_USEFUL_EPOCHS,
    DatasetPlan,
    DiskPlan,
    FlopsPlan,
    ModelPlan,
    RunPlan,
    StepPlan,
    TimePlan,
    TrainingPlan,
)

logger = logging.getLogger(__name__)

NOT_MEASURED = TimePlan(None, None, None, "not measured: it does not fit into memory")


def make_plan(config: Config, explicit: Collection[str]) -> TrainingPlan:
    """Compute what a configuration amounts to.

    It is that of a new run: a run that exists in the run folder is not looked at. A new text is
    prepared into the user's cache, where training finds it.

    Raises:
        UserError: for all that training refuses, with the same message.
    """
    start_time = time.monotonic()
    with tempfile.TemporaryDirectory() as temp_dir:
        config = dataclasses.replace(config, restart=True)  # nothing of an existing run is taken
        resolved = resolve_run(
            config, explicit, SINGLE_PROCESS, temp_dir=Path(temp_dir), is_plan=True
        )
    dataset, device, precision = resolved.dataset, resolved.device, resolved.precision
    config = fit_time_limit(resolved, start_time=start_time).config
    use_fsdp(config, device, precision, SINGLE_PROCESS)
    for notice in dataset.notices:
        logger.info(f"note: {notice}")

    c, params = config, num_params(config.model)
    estimator = MemoryEstimator(c, precision, device)
    is_explicit = "batch_size" in explicit
    micro_batch = c.batch_size if is_explicit else estimator.micro_batch()
    memory = estimator.estimate(
        micro_batch, f"{device} ({resolved.device_description}), {precision.name}"
    )
    run, disk = _plan_run(c, dataset), _plan_disk(c, dataset)
    per_token = flops_per_token(c.model, c.context_length)
    per_step = per_token * c.tokens_per_step
    warnings = [memorization_warning(c, run, tokens=len(dataset.train))]
    if not memory.fits:
        warnings.append(f"memory: {estimator.suggest_fix(micro_batch, is_explicit=is_explicit)}")
    if c.teachers:
        warnings.append(f"teachers: disk of all {c.teachers} comes on top, the time is included")
    if disk.free_bytes < disk.checkpoint_bytes + HEADROOM_BYTES:
        warnings.append("disk: no room for one checkpoint; free some, or use another --out_dir")
    elif not disk.fits:
        warnings.append("disk: it would fill up; free some, or use a smaller --keep_checkpoints")
    return TrainingPlan(
        ok=memory.fits and disk.fits,
        model=ModelPlan(
            preset=c.preset,
            n_layer=c.n_layer,
            n_embd=c.n_embd,
            n_head=c.n_head,
            block_size=c.block_size,
            vocab_size=c.vocab_size,
            parameters=params,
            non_embedding_parameters=params - num_embedding_params(c.model),
        ),
        text=DatasetPlan(
            path=dataset.path.as_posix(),
            characters=dataset.characters,
            bytes=dataset.bytes,
            tokenizer=dataset.tokenizer.name,
            tokenizer_ids=dataset.tokenizer.vocab_size,
            tokens=len(dataset.train),
            held_out_tokens=len(dataset.val),
            prepared_now=resolved.is_new_text,
        ),
        step=StepPlan(
            sequences=c.global_batch_size,
            context_length=c.context_length,
            tokens=c.tokens_per_step,
            micro_batch=micro_batch,
            requested_micro_batch=c.batch_size,
        ),
        run=run,
        flops=FlopsPlan(per_token, per_step, per_step * c.max_steps),
        memory=memory,
        disk=disk,
        time=_plan_time(c, explicit, device, micro_batch) if memory.fits else NOT_MEASURED,
        warnings=tuple(warning for warning in warnings if warning),
    )


def memorization_warning(config: Config, run: RunPlan, *, tokens: int) -> str:
    """Warn if a large model reads a small text too often; empty if it does not.

    GPTs store about 3.6 bits a parameter (Morris et al., "How much do language models memorize?",
    2025), and a token of text has a few bits once the language is known, so a model with a
    parameter per token can memorize the text. Whether it does depends on the epochs. Dropout
    delays it by an unknown amount, and turns the warning off.
    """
    params = num_params(config.model)
    if run.epochs <= MAX_USEFUL_EPOCHS or tokens >= params or config.dropout:
        return ""
    kept = "; the checkpoint with the best held-out loss is kept"
    return (
        f"overfitting: {run.epochs:.1f} epochs over the text, by a model with "
        f"{params / tokens:.1f} parameters for each of its tokens, will memorize it: use more "
        f"text, a smaller model or --dropout{kept if config.val_fraction else ''}"
    )


def _plan_run(config: Config, dataset: Dataset) -> RunPlan:
    tokens = config.max_steps * config.tokens_per_step
    sequences = sequences_per_epoch(
        len(dataset.train), config.context_length, random_offset=config.random_offset
    )
    return RunPlan(
        steps=config.max_steps,
        tokens=tokens,
        epochs=config.max_steps * config.global_batch_size / sequences,
        tokens_per_parameter=tokens / num_params(config.model),
    )


def _plan_disk(config: Config, dataset: Dataset) -> DiskPlan:
    saves = math.ceil(config.max_steps / config.save_every)
    if len(dataset.val):
        # Every evaluation may be the best so far, and is saved then.
        saves += config.max_steps // config.eval_every
    # The best, the last, those of --keep_checkpoints, and one that is being written.
    count = min(saves, config.keep_checkpoints + 3)
    count += sum(step < config.max_steps for step in config.early_steps)
    # And the one before the decay of wsd.
    count += config.schedule == "wsd"
    size = checkpoint_bytes(config)
    free = files.free_disk_bytes(Path(config.out_dir))
    needed = count * size + HEADROOM_BYTES
    return DiskPlan(
        out_dir=config.out_dir,
        checkpoint_bytes=size,
        checkpoints=count,
        needed_bytes=needed,
        free_bytes=free,
        fits=needed <= free,
    )


def _plan_time(
    config: Config, explicit: Collection[str], device: torch.device, micro_batch: int
) -> TimePlan:
    try:
        timing = time_step(config, explicit, device=device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError) as error:
        return dataclasses.replace(NOT_MEASURED, how=f"not measured: {error}")
    per_step = timing.seconds_per_sequence * config.global_batch_size
    return TimePlan(
        seconds=per_step * config.max_steps * cost_with_teachers(config),
        seconds_per_step=per_step,
        tokens_per_second=config.tokens_per_step / per_step,
        how=f"measured here: {timing.how}",
    )
