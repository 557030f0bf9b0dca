"""Model, optimizer and precision on their device: compiled if that works, cut to its memory."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from gptforge import costs
from gptforge.build.packages import choose_packages, trouble_of
from gptforge.build.parallel import has_room_to_gather, wants_shards
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.run_folder import Opening
from gptforge.checkpoint.tensors import load_model_tensors
from gptforge.config import Config
from gptforge.distributed import ALONE, Ranks
from gptforge.distributed.shards import fill
from gptforge.errors import RunError, UserError
from gptforge.hardware import (
    PLAIN,
    Kernels,
    Precision,
    attention_kernel,
    cache_folder,
    choose_kernels,
    try_compile,
    usable_memory,
)
from gptforge.kernels.packed_attention import ByTriton, fastest
from gptforge.model import GPT
from gptforge.optim.choice import build_optimizer
from gptforge.report.duration import in_words
from gptforge.train.micro_batch import find_micro_batch
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
    kernels = choose_kernels(
        device,
        precision,
        compile_flag=config.compile,
        dropout=config.dropout,
        recompute=config.activation_checkpointing,
    )
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
        say=say if ranks.is_first else lambda text: print(f"{ranks.where}: {text}", flush=True),
        ranks=ranks,
        root=root,
    )
    trouble = trouble_of(step, config) if step.kernels.by_hand else ""
    if not ranks.all_of(not trouble):
        say(f"note: the update that is written out does not run here: {trouble or 'on all ranks'}")
        step.use(dataclasses.replace(step.kernels, by_hand=False, fused_head=False))
    choose_packages(step, config, ranks, say=say)
    step.micro_batch = ranks.least(_micro_batch(step, config, ranks, by_hand=by_hand))
    windows = f"{config.global_batch} windows a step in micro-batches of {step.micro_batch}"
    if ranks.size > 1:
        windows += f" on each of {ranks.size} ranks"
    say(f"attention: {attention_of(step, config)}; {windows}")
    try:
        compiled, reason = _compile(step, config)
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


def _compile(step: TrainStep, config: Config) -> tuple[bool, str]:
    """Compile the update if that is asked for and works; whether it was, and why."""
    if step.kernels.by_hand:
        return False, "an update is written out kernel by kernel"

    def attempt() -> None:
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


def _micro_batch(step: TrainStep, config: Config, ranks: Ranks, *, by_hand: bool) -> int:
    """Windows that go through the model at once: those asked for, fewer where memory is short."""
    device, length = step.device, config.context_length
    own = config.global_batch // ranks.size
    most = min(config.batch_size, own)
    is_gpu = device.type == "cuda"
    if by_hand:
        return most
    name = str(device)
    if step.is_sharded:
        # A trial that failed on one rank would leave the others waiting: the estimate decides. With
        # the memory that sharding frees, more windows go through at a time, and weights are fetched
        # less often.
        return find_micro_batch(
            own if is_gpu else most,
            estimate=lambda windows: _sharded_memory_of(step, config, windows, ranks),
            free=usable_memory(device),
            fits=lambda n: True,
            remembered=None,
            key="",
        )
    if is_gpu:
        name = torch.cuda.get_device_name(device)
    return find_micro_batch(
        most,
        estimate=lambda n: sum(memory_of(config, n, step.precision, step.kernels).values()),
        free=usable_memory(device),
        # A machine that runs out of memory gives no error: it kills. So a CPU is not tried.
        fits=lambda n: not is_gpu or step.fits(n, length),
        remembered=cache_folder() / "micro_batches.json" if is_gpu else None,
        key=f"{config.model} {length} {step.precision.dtype} {step.kernels.by_hand} "
        f"{config.activation_checkpointing} {config.loss_chunk} {torch.__version__} {name}",
    )


def memory_of(
    config: Config, windows: int, precision: Precision, kernels: Kernels
) -> dict[str, int]:
    """Bytes to train with so many windows at a time, by what they hold: an estimate from above."""
    return costs.training_parts(
        config.model,
        config.context_length,
        windows,
        mixed=precision.is_mixed,
        by_hand=kernels.by_hand,
        recompute=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def _sharded_memory_of(step: TrainStep, config: Config, windows: int, ranks: Ranks) -> int:
    """The same, in all, for a model that several ranks share."""
    savings: dict[str, Any] = {
        "recompute": config.activation_checkpointing, "loss_chunk": config.loss_chunk,
    }  # fmt: skip
    where = (config.model, config.context_length, windows)
    if step.kernels.by_hand:
        return costs.gathered_bytes(*where, ranks=ranks.size, **savings)
    mixed = step.precision.is_mixed
    return costs.sharded_bytes(*where, ranks=ranks.size, mixed=mixed, **savings)


def refuse_too_large(
    config: Config, device: torch.device, precision: Precision, *, by_hand: bool
) -> None:
    """Raise a UserError if a CPU's memory cannot hold a run, which would be killed without a word.

    The estimate is from above, so that only what is far too large is refused. A GPU says by itself
    when its memory is full.
    """
    free = usable_memory(device)
    if device.type == "cuda" or free is None:
        return
    windows = config.batch_size if by_hand else 1
    parts = memory_of(config, windows, precision, PLAIN)
    needed = sum(parts.values()) - parts["snapshot"] - parts["activations"] // 2
    if needed <= free:
        return
    figures = f"at least {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if windows > 1:
        raise UserError(
            f"--batch_size {windows} takes {figures}: leave it out, and the program finds one that "
            "fits and learns the same"
        )
    raise UserError(
        f"this model takes {figures}, even with one window at a time: use a smaller one, or a "
        "shorter --context_length; gptforge plan says what would fit"
    )


def what_would_fit(step: TrainStep, config: Config) -> str:
    """Words for a micro-batch that is too large, with one that is not; tried out, not compiled."""
    if step.is_sharded:
        return (
            f"micro-batches of {step.micro_batch} do not fit into the memory of {step.device}: "
            "give a smaller --batch_size with more --gradient_accumulation_steps, or "
            "--activation_checkpointing true"
        )
    step.use(step.kernels)
    # Only a divisor keeps the global batch, and with it what is learned.
    smaller = [n for n in range(step.micro_batch - 1, 0, -1) if config.global_batch % n == 0]
    fitting = next((n for n in smaller if step.fits(n, config.context_length)), None)
    too_large = f"--batch_size {step.micro_batch} does not fit into the memory of {step.device}"
    if fitting is None:
        return f"{too_large}, nor does less: use a smaller --context_length or model"
    return (
        f"{too_large}; --batch_size {fitting} --gradient_accumulation_steps "
        f"{config.global_batch // fitting} would, and learns the same"
    )


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
    evaluations = 1 + (steps - 1) // config.eval_every if config.eval_every else 1
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
