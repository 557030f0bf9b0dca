"""Model, optimizer and precision on their device, compiled if that works."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge.builders.memory_fit import (
    choose_micro_batch,
    fits_zero1,
    kernels_for,
    out_of_memory_hint,
)
from gptforge.builders.optional_kernels import choose_packages, find_failure
from gptforge.builders.parallel import use_fsdp
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.checkpoint.state_dict import load_model_state_dict
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.distributed.dtensor import copy_from_rank0
from gptforge.errors import RunError
from gptforge.estimate import formulas
from gptforge.kernel_select import sdpa_backend, try_compile
from gptforge.kernels.attention import TritonAttention, select_attention
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.printable import safe_print
from gptforge.report.format import format_duration
from gptforge.train.parallel.fsdp import apply_fsdp
from gptforge.train.train_step import TrainStep

Say = Callable[[str], None]

SLOW_RUN_SECONDS = 6 * 3600
"""Seconds of a run on a CPU from which on something smaller is advised."""
CUDA_GRAPH_MAX_FLOPS = 5e12
"""FLOPs of a micro-batch below which asking for its kernels takes longer than they do."""


def build_train_step(
    config: Config,
    opening: OpenedRun,
    device: torch.device,
    precision: Precision,
    *,
    explicit: Collection[str],
    log: Say,
    comm: Comm = SINGLE_PROCESS,
    wait_for_warmup: Callable[[], None] = lambda: None,
) -> TrainStep:
    """Model and optimizer on their device, compiled if that works; says what was chosen.

    `ready` is called once the weights are there, and waits for what else is being made ready.
    """
    model = _model(config, opening, comm)
    wait_for_warmup()
    root = None
    if shards := use_fsdp(config, device, precision, comm, log):
        root = apply_fsdp(model, precision, comm)
    else:
        model.to(device)
    if comm.world_size > 1 and not shards and opening.checkpoint is None:
        # Drawn from the same seed on all; another processor may round another way.
        for parameter in model.parameters():
            copy_from_rank0(parameter, parameter if comm.is_main else None, comm)
    kernels = kernels_for(config, device, precision)
    if shards and kernels.manual_backward and not fits_zero1(config, device, explicit, comm):
        kernels = dataclasses.replace(kernels, manual_backward=False)
    betas = (config.beta1, config.beta2)
    by_hand = "batch_size" in explicit
    step = TrainStep(
        model,
        build_optimizer(config.optimizer, model, betas=betas, weight_decay=config.weight_decay),
        precision=precision,
        micro_batch_size=config.batch_size,
        grad_clip=config.grad_clip,
        kernels=kernels,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
        halve_on_oom=not by_hand and not shards,
        log=log if comm.is_main else lambda text: safe_print(f"{comm.label}: {text}"),
        comm=comm,
        root=root,
    )
    trouble = find_failure(step, config) if step.kernels.manual_backward else ""
    if not comm.all_true(not trouble):
        log(f"note: the update that is written out does not run here: {trouble or 'on all ranks'}")
        step.set_kernels(
            dataclasses.replace(step.kernels, manual_backward=False, fused_cross_entropy=False)
        )
    choose_packages(step, config, comm, say=log)
    step.micro_batch_size = comm.all_reduce_min(
        choose_micro_batch(step, config, comm, is_explicit=by_hand)
    )
    windows = (
        f"{config.global_batch_size} windows a step in micro-batches of {step.micro_batch_size}"
    )
    if comm.world_size > 1:
        windows += f" on each of {comm.world_size} ranks"
    log(f"attention: {attention_backend(step, config)}; {windows}")
    try:
        compiled, reason = _compile(step, config, log)
        if device.type == "cuda" and not compiled:
            step.dry_run(step.micro_batch_size, config.context_length)
    except torch.OutOfMemoryError:
        raise RunError(out_of_memory_hint(step, config)) from None
    log(f"torch.compile: {'on' if compiled else 'off'}, {reason}")
    flops = formulas.flops_per_token(config.model, config.context_length)
    is_small = flops * step.micro_batch_size * config.context_length < CUDA_GRAPH_MAX_FLOPS
    can_record = step.kernels.manual_backward and not shards
    if (
        is_small
        and can_record
        and not comm.all_true(step.capture_cuda_graph(config.context_length))
    ):
        step.set_kernels(step.kernels)
    return step


def _compile(step: TrainStep, config: Config, say: Say) -> tuple[bool, str]:
    """Compile the update if that is asked for and works; whether it was, and why."""
    if step.kernels.manual_backward:
        return False, "an update is written out kernel by kernel"

    def attempt() -> None:
        say("torch.compile: at work, which can take a minute")
        step.compile()
        step.dry_run(step.micro_batch_size, config.context_length)

    compiled, reason = try_compile(config.compile, step.device, attempt)
    if not compiled:
        step.set_kernels(step.kernels)
    return compiled, reason


def attention_backend(step: TrainStep, config: Config) -> str:
    """Which kernels make this model's attention on this device."""
    head_size, dtype = config.n_embd // config.n_head, step.precision.dtype
    picked = sdpa_backend(
        step.device, dtype, n_head=config.n_head, head_size=head_size,
        context_length=config.context_length,
    )  # fmt: skip
    way = select_attention(step.device, dtype, head_size=head_size, dropout=config.dropout)
    is_ours = step.kernels.manual_backward and isinstance(way, TritonAttention)
    return "cudnn, its way back in Triton" if is_ours else picked


def _model(config: Config, opening: OpenedRun, ranks: Comm) -> GPT:
    model = GPT(config.model)
    if opening.checkpoint is not None:
        # Restoring the run fills it, with all else that the checkpoint holds.
        return model
    if not config.init_from:
        return model.init_weights(torch.Generator().manual_seed(config.seed))
    path = checkpoints.resolve_checkpoint(config.init_from) if ranks.is_main else Path()
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL) if ranks.is_main else {}
    load_model_state_dict(model, tensors, source=path.as_posix(), comm=ranks)
    return model


def estimate_duration(
    step: TrainStep, config: Config, *, steps: int, val_tokens: int = 0, comm: Comm = SINGLE_PROCESS
) -> str:
    """How long training will take, from a rehearsal on this machine.

    Args:
        step: is rehearsed.
        config: of the run.
        steps: updates that are left.
        judged: held-out tokens that an evaluation reads.
        ranks: who share both.
    """
    # A few windows tell enough where a whole micro-batch would take minutes.
    few = max(1, 2048 // config.context_length)
    fast = step.is_compiled or step.device.type == "cuda"
    windows = step.micro_batch_size if fast else min(step.micro_batch_size, few)
    seconds = step.dry_run(windows, config.context_length)
    # Asked of all: in shards a rehearsal takes all of them.
    if comm.all_true(seconds < 1):
        # The first pass over a shape pays for warming up.
        seconds = min(step.dry_run(windows, config.context_length) for _ in range(2))
    total = seconds / windows * config.global_batch_size / comm.world_size * steps
    advice = ""
    if step.device.type == "cpu" and total > SLOW_RUN_SECONDS:
        advice = "; a CPU is slow for that: fewer --max_steps, or --preset shakespeare-cpu"
    evaluations = 1 + (steps - 1) // config.eval_every
    # The way forward is a third of an update's work.
    reading = (
        seconds / windows / config.context_length * val_tokens / comm.world_size / 3 * evaluations
    )
    if reading > max(total / 4, 10):
        times = f"{evaluations:,} times" if evaluations > 1 else "once"
        advice += (
            f"; judging it {times} by {val_tokens:,} held-out tokens about {format_duration(reading)} more, "
            "which --eval_every and --eval_tokens change"
        )
    return (
        f"this will take about {format_duration(total)}: {steps:,} steps of {config.tokens_per_step:,} "
        f"tokens, {formulas.num_params(config.model):,} parameters{advice}"
    )
