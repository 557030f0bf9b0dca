"""Plan a run: resolve and check the configuration as training does, and compute size and cost."""

import dataclasses
import logging
import math
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gptforge import files
from gptforge.builders.memory_fit import MemoryEstimator, use_fsdp
from gptforge.builders.resolve_run import resolve_run
from gptforge.builders.step_timing import fit_time_limit, time_step
from gptforge.builders.teachers import cost_with_teachers
from gptforge.checkpoint.store import HEADROOM_BYTES
from gptforge.config import Config
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset
from gptforge.distributed import SINGLE_PROCESS
from gptforge.errors import RunError
from gptforge.estimate import formulas

logger = logging.getLogger(__name__)

MAX_USEFUL_EPOCHS = 4
"""Up to this many epochs, repeated text is about as good as new text (Muennighoff et al., "Scaling
data-constrained language models", 2023)."""


def make_plan(config: Config, explicit: Collection[str]) -> dict[str, Any]:
    """Compute size and cost of a run, as `gptforge plan --json` prints them.

    The plan is that of a new run, whatever the run folder holds. A new text is prepared into the
    user's cache, where training finds it.

    Raises:
        UserError: for all that training refuses, with the same message.
    """
    with tempfile.TemporaryDirectory() as temp_dir:
        config = dataclasses.replace(config, restart=True)  # nothing of an existing run is taken
        resolved = resolve_run(config, explicit, SINGLE_PROCESS, temp_dir=Path(temp_dir))
    dataset, device, precision = resolved.dataset, resolved.device, resolved.precision
    c = fit_time_limit(resolved).config
    use_fsdp(c, device, precision, SINGLE_PROCESS)
    for notice in () if resolved.is_new_text else dataset.notices:
        logger.info(f"note: {notice}")

    estimator = MemoryEstimator(c, precision, device)
    is_explicit = "batch_size" in explicit
    micro_batch = estimator.micro_batch(explicit)
    memory, fits = estimator.memory(micro_batch), estimator.fits(micro_batch)
    params = formulas.num_params(c.model)
    flops_per_token = formulas.flops_per_token(c.model, c.context_length)
    sequences = sequences_per_epoch(
        len(dataset.train), c.context_length, random_offset=c.random_offset
    )
    tokens, epochs = c.max_steps * c.tokens_per_step, c.max_steps * c.global_batch_size / sequences
    disk = _plan_disk(c, dataset)
    warnings = [memorization_warning(c, epochs, tokens=len(dataset.train))]
    if not fits:
        warnings.append(f"memory: {estimator.suggest_fix(micro_batch, is_explicit=is_explicit)}")
    if c.teachers:
        warnings.append(f"teachers: disk of all {c.teachers} comes on top, the time is included")
    if not disk["fits"]:
        problem = "it would fill up; free some, or use a smaller --keep_checkpoints"
        if disk["free_bytes"] < disk["checkpoint_bytes"] + HEADROOM_BYTES:
            problem = "no room for one checkpoint; free some, or use another --out_dir"
        warnings.append(f"disk: {problem}")
    shape = ("preset", "n_layer", "n_embd", "n_head", "block_size", "vocab_size")
    return {
        "ok": fits and disk["fits"],
        "model": {
            **{name: getattr(c, name) for name in shape},
            "parameters": params,
            "non_embedding_parameters": params - formulas.num_embedding_params(c.model),
        },
        "text": {
            "path": dataset.path.as_posix(),
            "characters": dataset.characters,  # 0 if unknown, as with shards of another program
            "bytes": dataset.bytes,
            "tokenizer": dataset.tokenizer.name,
            "tokenizer_ids": dataset.tokenizer.vocab_size,
            "tokens": len(dataset.train),
            "held_out_tokens": len(dataset.val),
            "prepared_now": resolved.is_new_text,
        },
        "step": {
            "sequences": c.global_batch_size,
            "context_length": c.context_length,
            "tokens": c.tokens_per_step,
            "micro_batch": micro_batch,
            "requested_micro_batch": c.batch_size,
        },
        "run": {
            "steps": c.max_steps,
            "tokens": tokens,
            "epochs": epochs,
            "tokens_per_parameter": tokens / params,
        },
        "flops": {
            "per_token": flops_per_token,
            "per_step": flops_per_token * c.tokens_per_step,
            "run": flops_per_token * tokens,
            "formula": "6 N + 12 L C T",
        },
        "memory": {
            "device": f"{device} ({resolved.device_description}), {precision.name}",
            "needed_bytes": sum(memory.values()),
            "parts": memory,
            "free_bytes": estimator.free_memory,
            "fits": fits,
        },
        "disk": disk,
        "time": _plan_time(c, explicit, device, micro_batch, fits=fits),
        "warnings": [warning for warning in warnings if warning],
    }


def memorization_warning(config: Config, epochs: float, *, tokens: int) -> str:
    """Warn if a large model reads a small text too often; empty if it does not.

    GPTs store about 3.6 bits a parameter (Morris et al., "How much do language models memorize?",
    2025), and a token of text has a few bits once the language is known, so a model with a
    parameter per token can memorize the text. Whether it does depends on the epochs. Dropout
    delays it by an unknown amount, and turns the warning off.
    """
    params = formulas.num_params(config.model)
    if epochs <= MAX_USEFUL_EPOCHS or tokens >= params or config.dropout:
        return ""
    kept = "; the checkpoint with the best held-out loss is kept"
    return (
        f"overfitting: {epochs:.1f} epochs over the text, by a model with "
        f"{params / tokens:.1f} parameters for each of its tokens, may memorize it: use more "
        f"text, a smaller model or --dropout{kept if config.val_fraction else ''}"
    )


def _plan_disk(c: Config, dataset: Dataset) -> dict[str, Any]:
    saves = math.ceil(c.max_steps / c.save_every)
    if len(dataset.val):
        # Every evaluation may be the best so far, and is saved then.
        saves += c.max_steps // c.eval_every
    # The best, the last, those of --keep_checkpoints, and one that is being written.
    count = min(saves, c.keep_checkpoints + 3)
    count += sum(step < c.max_steps for step in c.early_steps)
    # And the one before the decay of wsd.
    count += c.schedule == "wsd"
    size, free = formulas.checkpoint_bytes(c), files.free_disk_bytes(Path(c.out_dir))
    needed = count * size + HEADROOM_BYTES
    return {
        "out_dir": c.out_dir,
        "checkpoint_bytes": size,
        "checkpoints": count,
        "needed_bytes": needed,
        "free_bytes": free,
        "fits": free is None or needed <= free,
    }


def _plan_time(
    c: Config, explicit: Collection[str], device: torch.device, micro_batch: int, *, fits: bool
) -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(("seconds", "seconds_per_step", "tokens_per_second"))
    if not fits:
        return {**unknown, "how": "not measured: it does not fit into memory"}
    try:
        per_sequence, how = time_step(c, explicit, device=device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError) as error:
        return {**unknown, "how": f"not measured: {error}"}
    per_step = per_sequence * c.global_batch_size
    return {
        "seconds": per_step * c.max_steps * cost_with_teachers(c),
        "seconds_per_step": per_step,
        "tokens_per_second": c.tokens_per_step / per_step,
        "how": f"measured here: {how}",
    }
