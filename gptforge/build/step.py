"""Model, optimizer and precision on their device, compiled if that works."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import costs
from gptforge.build.fitting import (
    has_room_to_gather,
    kernels_of,
    micro_batch,
    what_would_fit,
)
from gptforge.build.packages import choose_packages, trouble_of
from gptforge.build.parallel import wants_shards
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.run_folder import Opening
from gptforge.checkpoint.tensors import load_model_tensors
from gptforge.config import Config
from gptforge.distributed import ALONE, Ranks
from gptforge.distributed.shards import fill
from gptforge.errors import RunError
from gptforge.hardware import (
    Precision,
    attention_kernel,
    try_compile,
)
from gptforge.kernels.packed_attention import ByTriton, fastest
from gptforge.model import GPT
from gptforge.optim.choice import build_optimizer
from gptforge.printable import safe_print
from gptforge.report.duration import in_words
from gptforge.train.savings import Savings
from gptforge.train.sharded import shard
from gptforge.train.step import TrainStep

Say = Callable[[str], None]

LONG = 6 * 3600
"""Seconds of a run on a CPU from which on something smaller is advised."""
REPLAY_BELOW = 5e12
"""FLOPs of a micro-batch below which asking for its kernels takes longer than they do."""


def train_step(
    config: Config,
    opening: Opening,
    device: torch.device,
    precision: Precision,
    *,
    given: Collection[str],
    say: Say,
    ranks: Ranks = ALONE,
    ready: Callable[[], None] = lambda: None,
) -> TrainStep:
    """Model and optimizer on their device, compiled if that works; says what was chosen.

    `ready` is called once the weights are there, and waits for what else is being made ready.
    """
    model = _model(config, opening, ranks)
    ready()
    root = None
    if shards := wants_shards(config, device, precision, ranks, say):
        root = shard(model, precision, ranks)
    else:
        model.to(device)
    if ranks.size > 1 and not shards and opening.checkpoint is None:
        # Drawn from the same seed on all; another processor may round another way.
        for parameter in model.parameters():
            fill(parameter, parameter if ranks.is_first else None, ranks)
    kernels = kernels_of(config, device, precision)
    if shards and kernels.by_hand and not has_room_to_gather(config, device, given, ranks):
        kernels = dataclasses.replace(kernels, by_hand=False)
    betas = (config.beta1, config.beta2)
    by_hand = "batch_size" in given
    step = TrainStep(
        model,
        build_optimizer(config.optimizer, model, betas=betas, weight_decay=config.weight_decay),
        precision=precision,
        micro_batch=config.batch_size,
        grad_clip=config.grad_clip,
        kernels=kernels,
        savings=Savings(config.activation_checkpointing, config.loss_chunk),
        may_shrink=not by_hand and not shards,
        say=say if ranks.is_first else lambda text: safe_print(f"{ranks.where}: {text}"),
        ranks=ranks,
        root=root,
    )
    trouble = trouble_of(step, config) if step.kernels.by_hand else ""
    if not ranks.all_of(not trouble):
        say(f"note: the update that is written out does not run here: {trouble or 'on all ranks'}")
        step.use(dataclasses.replace(step.kernels, by_hand=False, fused_head=False))
    choose_packages(step, config, ranks, say=say)
    step.micro_batch = ranks.least(micro_batch(step, config, ranks, by_hand=by_hand))
    windows = f"{config.global_batch} windows a step in micro-batches of {step.micro_batch}"
    if ranks.size > 1:
        windows += f" on each of {ranks.size} ranks"
    say(f"attention: {attention_of(step, config)}; {windows}")
    try:
        compiled, reason = _compile(step, config, say)
        if device.type == "cuda" and not compiled:
            step.rehearse(step.micro_batch, config.context_length)
    except torch.OutOfMemoryError:
        raise RunError(what_would_fit(step, config)) from None
    say(f"torch.compile: {'on' if compiled else 'off'}, {reason}")
    flops = costs.flops_per_token(config.model, config.context_length)
    is_small = flops * step.micro_batch * config.context_length < REPLAY_BELOW
    can_record = step.kernels.by_hand and not shards
    if is_small and can_record and not ranks.all_of(step.record(config.context_length)):
        step.use(step.kernels)
    return step


def _compile(step: TrainStep, config: Config, say: Say) -> tuple[bool, str]:
    """Compile the update if that is asked for and works; whether it was, and why."""
    if step.kernels.by_hand:
        return False, "an update is written out kernel by kernel"

    def attempt() -> None:
        say("torch.compile: at work, which can take a minute")
        step.compile()
        step.rehearse(step.micro_batch, config.context_length)

    compiled, reason = try_compile(config.compile, step.device, attempt)
    if not compiled:
        step.use(step.kernels)
    return compiled, reason


def attention_of(step: TrainStep, config: Config) -> str:
    """Which kernels make this model's attention on this device."""
    head_size, dtype = config.n_embd // config.n_head, step.precision.dtype
    picked = attention_kernel(
        step.device, dtype, n_head=config.n_head, head_size=head_size,
        context_length=config.context_length,
    )  # fmt: skip
    way = fastest(step.device, dtype, head_size=head_size, dropout=config.dropout)
    is_ours = step.kernels.by_hand and isinstance(way, ByTriton)
    return "cudnn, its way back in Triton" if is_ours else picked


def _model(config: Config, opening: Opening, ranks: Ranks) -> GPT:
    model = GPT.unfilled(config.model)
    if opening.checkpoint is not None:
        # Restoring the run fills it, with all else that the checkpoint holds.
        return model
    if not config.init_from:
        return model.initialize(torch.Generator().manual_seed(config.seed))
    path = checkpoints.resolve(config.init_from) if ranks.is_first else Path()
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL) if ranks.is_first else {}
    load_model_tensors(model, tensors, source=path.as_posix(), ranks=ranks)
    return model


def estimate(
    step: TrainStep, config: Config, *, steps: int, judged: int = 0, ranks: Ranks = ALONE
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
    windows = step.micro_batch if fast else min(step.micro_batch, few)
    seconds = step.rehearse(windows, config.context_length)
    # Asked of all: in shards a rehearsal takes all of them.
    if ranks.all_of(seconds < 1):
        # The first pass over a shape pays for warming up.
        seconds = min(step.rehearse(windows, config.context_length) for _ in range(2))
    total = seconds / windows * config.global_batch / ranks.size * steps
    advice = ""
    if step.device.type == "cpu" and total > LONG:
        advice = "; a CPU is slow for that: fewer --max_steps, or --preset shakespeare-cpu"
    evaluations = 1 + (steps - 1) // config.eval_every
    # The way forward is a third of an update's work.
    reading = seconds / windows / config.context_length * judged / ranks.size / 3 * evaluations
    if reading > max(total / 4, 10):
        times = f"{evaluations:,} times" if evaluations > 1 else "once"
        advice += (
            f"; judging it {times} by {judged:,} held-out tokens about {in_words(reading)} more, "
            "which --eval_every and --eval_tokens change"
        )
    return (
        f"this will take about {in_words(total)}: {steps:,} steps of {config.tokens_per_step:,} "
        f"tokens, {costs.parameters(config.model):,} parameters{advice}"
    )
