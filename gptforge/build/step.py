"""Model, optimizer and precision on their device: compiled if that works, cut to its memory."""

from collections.abc import Callable, Collection

import torch

from gptforge import costs
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.run_folder import Opening
from gptforge.checkpoint.tensors import load_model_tensors
from gptforge.config import Config
from gptforge.errors import RunError
from gptforge.hardware import (
    Precision,
    attention_kernel,
    cache_folder,
    choose_kernels,
    free_memory,
    try_compile,
)
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.report.duration import in_words
from gptforge.train.micro_batch import find_micro_batch
from gptforge.train.step import TrainStep

Say = Callable[[str], None]


def train_step(
    config: Config,
    opening: Opening,
    device: torch.device,
    precision: Precision,
    *,
    given: Collection[str],
    say: Say,
) -> TrainStep:
    """Model and optimizer on their device, compiled if that works; says what was chosen."""
    model = _model(config, opening).to(device)
    betas = (config.beta1, config.beta2)
    by_hand = "batch_size" in given
    step = TrainStep(
        model,
        build_adamw(model, betas=betas, weight_decay=config.weight_decay),
        precision=precision,
        micro_batch=config.batch_size,
        grad_clip=config.grad_clip,
        kernels=choose_kernels(device, precision),
        may_shrink=not by_hand,
        say=say,
    )
    if step.kernels.trouble:
        say(f"note: the loss is computed apart from its layer, slower: {step.kernels.trouble}")
    step.micro_batch = _micro_batch(step, config, by_hand=by_hand)
    windows = f"{config.global_batch} windows a step in micro-batches of {step.micro_batch}"
    say(f"attention: {attention_of(step, config)}; {windows}")

    def attempt() -> None:
        step.compile()
        step.rehearse(step.micro_batch, config.context_length)

    try:
        compiled, reason = try_compile(config.compile, device, attempt)
        if not compiled:
            step.drop_compiled()
            if device.type == "cuda":
                step.rehearse(step.micro_batch, config.context_length)
    except torch.OutOfMemoryError:
        raise RunError(what_would_fit(step, config)) from None
    say(f"torch.compile: {'on' if compiled else 'off'}, {reason}")
    return step


def attention_of(step: TrainStep, config: Config) -> str:
    """The attention kernel that torch picks for this model on this device."""
    return attention_kernel(
        step.device,
        step.precision.dtype,
        n_head=config.n_head,
        head_size=config.n_embd // config.n_head,
        context_length=config.context_length,
    )


def _model(config: Config, opening: Opening) -> GPT:
    model = GPT(config.model)
    if opening.checkpoint is not None:
        # Restoring the run fills it, with all else that the checkpoint holds.
        return model
    if not config.init_from:
        return model.initialize(torch.Generator().manual_seed(config.seed))
    path = checkpoints.resolve(config.init_from)
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL)
    load_model_tensors(model, tensors, source=path.as_posix())
    return model


def _micro_batch(step: TrainStep, config: Config, *, by_hand: bool) -> int:
    """Windows that go through the model at once: those asked for, fewer where memory is short."""
    device, length, most = step.device, config.context_length, config.batch_size
    is_gpu = device.type == "cuda"
    if by_hand:
        return most
    mixed, name = step.precision.is_mixed, str(device)
    if is_gpu:
        name = torch.cuda.get_device_name(device)
    return find_micro_batch(
        most,
        estimate=lambda n: costs.training_bytes(config.model, length, n, mixed=mixed),
        free=free_memory(device),
        # A machine that runs out of memory gives no error: it kills. So a CPU is not tried.
        fits=lambda n: not is_gpu or step.fits(n, length),
        remembered=cache_folder() / "micro_batches.json" if is_gpu else None,
        key=f"{config.model} {length} {step.precision.dtype} {torch.__version__} {name}",
    )


def what_would_fit(step: TrainStep, config: Config) -> str:
    """Words for a micro-batch that is too large, with one that is not; tried out, not compiled."""
    step.drop_compiled()
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


def estimate(step: TrainStep, config: Config, *, steps: int) -> str:
    """How long training will take, from a rehearsal on this machine."""
    # A few windows tell enough where a whole micro-batch would take minutes.
    few = max(1, 2048 // config.context_length)
    fast = step.is_compiled or step.device.type == "cuda"
    windows = step.micro_batch if fast else min(step.micro_batch, few)
    seconds = step.rehearse(windows, config.context_length)
    if seconds < 1:
        # The first pass over a shape pays for warming up.
        seconds = min(step.rehearse(windows, config.context_length) for _ in range(3))
    total = seconds / windows * config.global_batch * steps
    return (
        f"this will take about {in_words(total)}: {steps:,} steps of {config.tokens_per_step:,} "
        f"tokens, {costs.parameters(config.model):,} parameters"
    )
