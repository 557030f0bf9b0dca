"""Measures a `TrainStep` before training: how long it takes, and whether it fits into memory."""

import time
from typing import TYPE_CHECKING

import torch

from gptforge.device import preserve_rng_state, synchronize

if TYPE_CHECKING:
    from gptforge.training.train_step import TrainStep

MOMENT_BYTES, SAVE_BYTES, EMA_BYTES = 8, 12, 4
"""Per parameter: of AdamW's moments, of the copy that a save makes, and of the EMA in that copy."""


def dry_run(step_fn: "TrainStep", batch_size: int, context_length: int) -> float:
    """Time a forward and backward pass on dummy tokens, without side effects, in seconds."""
    device, num_tokens = step_fn.device, batch_size * context_length
    # Distinct ids: atomics on one row of the embedding's gradient would be far slower.
    tokens = torch.arange(num_tokens, device=device) % step_fn.model.config.vocab_size
    x = tokens.view(batch_size, context_length)
    step_fn.root_module.train()
    with preserve_rng_state(device):
        synchronize(device)
        start = time.perf_counter()
        step_fn.backend.zero_grad()
        step_fn.backend.forward_backward(x, x, 1 / num_tokens)
        synchronize(device)
    step_fn.optimizer.zero_grad()
    return time.perf_counter() - start


def fits_memory(step_fn: "TrainStep", batch_size: int, context_length: int) -> bool:
    """Whether a micro-batch fits into the device's memory, by a dry run."""
    reserved, fits = None, True
    try:
        # Hold the memory of a save, and before the first step that of the optimizer's state.
        if step_fn.device.type == "cuda":
            per_param = SAVE_BYTES + (0 if step_fn.ema is None else EMA_BYTES)
            per_param += 0 if step_fn.optimizer.state else MOMENT_BYTES
            nbytes = per_param * sum(p.numel() for p in step_fn.model.parameters())
            reserved = torch.empty(nbytes, dtype=torch.uint8, device=step_fn.device)
        dry_run(step_fn, batch_size, context_length)
    except torch.OutOfMemoryError:
        fits = False
    del reserved
    step_fn.optimizer.zero_grad()
    if step_fn.device.type == "cuda":
        # Blocks cached for this batch size would fragment the memory for the next one.
        torch.cuda.empty_cache()
    return fits


def time_optimizer(step_fn: "TrainStep") -> float:
    """Time an optimizer step on a CPU, without side effects, in seconds.

    0 on other devices: it is fast there, and in a CUDA graph faster than measured here.
    """
    if step_fn.device.type != "cpu":
        return 0.0
    optimizer = step_fn.optimizer
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    # Without side effects, since the step is skipped. That takes Muon as long. AdamW then does
    # nothing, and would otherwise take no longer than a copy of the weights.
    optimizer.found_inf = torch.ones(())
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 1:
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    optimizer.found_inf = None
    optimizer.zero_grad()
    return min(seconds)
