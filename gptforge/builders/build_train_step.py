"""Build a TrainStep: model, optimizer and kernels on their device, compiled if that works."""

import dataclasses
import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge.builders import memory_fit
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.state_dict import StateDict, load_model_state_dict
from gptforge.config import Config
from gptforge.convert.bundle import check_finite
from gptforge.device import Precision, keep_freed_memory
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import RunError, UserError, first_line
from gptforge.estimate.formulas import flops_per_token, num_params
from gptforge.kernel_select import sdpa_backend, select_kernels
from gptforge.kernels.attention import TritonAttention, select_attention
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.report.format import format_duration
from gptforge.training.distillation import Distillation
from gptforge.training.dry_run import dry_run, time_optimizer
from gptforge.training.parallel.fsdp import apply_fsdp
from gptforge.training.train_step import TrainStep

logger = logging.getLogger(__name__)

SLOW_RUN_SECONDS = 6 * 3600  # length of a run on a CPU from which a smaller one is suggested
CUDA_GRAPH_MAX_FLOPS = 5e12
"""FLOPs of a micro-batch below which launching the kernels takes longer than running them."""


def build_train_step(
    config: Config,
    device: torch.device,
    precision: Precision,
    *,
    explicit: Collection[str],
    is_resumed: bool = False,
    comm: Comm = SINGLE_PROCESS,
    wait_for_warmup: Callable[[], None] = lambda: None,
    distillation: Distillation | None = None,
) -> TrainStep:
    """Build model and optimizer, and select kernels, parallelism and micro-batch.

    The weights of a resumed run are left for `restore` to load. `wait_for_warmup` is called once
    the weights are there. Each choice is logged with the reason.
    """
    model = GPT(config.model)
    if not is_resumed:
        _init_weights(model, config, comm)
    wait_for_warmup()
    if device.type == "cpu":
        keep_freed_memory()
    kernels = select_kernels(config, device, precision)
    root = None
    if memory_fit.use_fsdp(config, device, precision, comm):
        root = apply_fsdp(model, precision, comm)
        if kernels.manual_backward and not memory_fit.fits_zero1(config, device, explicit, comm):
            if kernels.float8:
                raise UserError(
                    "--dtype fp8 keeps a full copy of the weights on each rank, which does not fit "
                    "there: use --dtype bfloat16"
                )
            kernels = dataclasses.replace(kernels, manual_backward=False)
    else:
        model.to(device)
        if comm.world_size > 1 and not is_resumed:
            # All ranks draw from the same seed, but another CPU may round differently.
            for parameter in model.parameters():
                comm.broadcast(parameter.detach())
    is_explicit = "batch_size" in explicit
    step = TrainStep(
        model, build_optimizer(config, model), config, precision=precision, kernels=kernels,
        halve_on_oom=not is_explicit and root is None, comm=comm, root=root,
        distillation=distillation,
    )  # fmt: skip
    failure = _try_manual_backward(step, config) if kernels.manual_backward else ""
    if not comm.all_true(not failure):
        if kernels.float8:
            raise RunError(f"--dtype fp8 does not run here: {failure or 'not on all ranks'}")
        logger.info(f"note: the manual backward does not run here: {failure or 'not on all ranks'}")
        step.set_kernels(
            dataclasses.replace(kernels, manual_backward=False, fused_cross_entropy=False)
        )
    step.micro_batch_size = comm.all_reduce_min(
        memory_fit.choose_micro_batch(step, config, comm, is_explicit=is_explicit)
    )
    per_rank = f" on each of {comm.world_size} ranks" if comm.world_size > 1 else ""
    logger.info(
        f"attention: {attention_backend(step, config)}; {config.global_batch_size} sequences per "
        f"step in micro-batches of {step.micro_batch_size}{per_rank}"
    )
    try:
        compiled, reason = try_compile(step, config)
        if device.type == "cuda" and not compiled:
            dry_run(step, step.micro_batch_size, config.context_length)
    except torch.OutOfMemoryError:
        raise RunError(memory_fit.out_of_memory_hint(step, config)) from None
    logger.info(f"torch.compile: {'on' if compiled else 'off'}, {reason}")
    flops = flops_per_token(config.model, config.context_length)
    is_small = flops * step.micro_batch_size * config.context_length < CUDA_GRAPH_MAX_FLOPS
    can_capture = step.kernels.manual_backward and root is None
    if config.dropout_ramp and not _has_triton_attention(step, config):
        can_capture = False  # a graph would replay SDPA with the dropout of its capture
    if is_small and can_capture:
        step.capture_cuda_graph(config.context_length)
    return step


def _init_weights(model: GPT, config: Config, comm: Comm) -> None:
    if not config.init_from:
        model.init_weights(torch.Generator().manual_seed(config.seed))
        return
    path, tensors = Path(), StateDict()
    if comm.is_main:
        path, tensors = checkpoints.read_checkpoint(
            config.init_from, lambda path: (path, checkpoints.read_tensors(path, checkpoints.MODEL))
        )
    check_finite(tensors, f"--init_from {config.init_from}")
    load_model_state_dict(model, tensors, source=path.as_posix(), comm=comm)


def _try_manual_backward(step: TrainStep, config: Config) -> str:
    """Run the manual backward once; return why it failed, or an empty string.

    Triton may be missing, or find no compiler or too old a driver, and raises anything then.
    """
    # At the expected size: cuDNN builds plans for each batch size. Sharded ranks have to run the
    # same sizes, whether or not one of them runs out of memory.
    for sequences in (1,) if step.is_sharded else (config.batch_size, 1):
        try:
            dry_run(step, sequences, config.context_length)
            return ""
        except torch.OutOfMemoryError:
            continue  # choose_micro_batch deals with it
        except Exception as error:
            return first_line(error)
    return ""


def try_compile(step: TrainStep, config: Config) -> tuple[bool, str]:
    """Compile if `--compile` wants it and it works; return whether, and why.

    The compiler needs Triton, a C++ compiler and a recent driver, and raises anything where one is
    missing.
    """
    if step.kernels.manual_backward:
        return False, "the manual backward does not use it"
    if config.dropout_ramp:
        return False, "each step of --dropout_ramp would compile the model again"
    if config.compile == "false":
        return False, "as requested"
    if config.compile == "auto" and step.device.type != "cuda":
        return False, f"takes longer than it saves on {step.device.type}"
    logger.info("torch.compile: compiling, which can take a minute")
    try:
        step.compile()
        dry_run(step, step.micro_batch_size, config.context_length)
        return True, "as requested" if config.compile == "true" else "faster after the first step"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"it failed here: {first_line(error)}"
    step.set_kernels(step.kernels)
    return False, reason


def attention_backend(step: TrainStep, config: Config) -> str:
    """Name the kernels that compute attention in this step."""
    if _has_triton_attention(step, config):
        return "cudnn, backward in Triton"
    return sdpa_backend(config, step.device, step.precision.dtype)


def _has_triton_attention(step: TrainStep, config: Config) -> bool:
    head_size, dtype = config.n_embd // config.n_head, step.precision.dtype
    attention = select_attention(step.device, dtype, head_size=head_size)
    return step.kernels.manual_backward and isinstance(attention, TritonAttention)


def estimate_duration(
    step: TrainStep, config: Config, *, steps: int, val_tokens: int = 0, comm: Comm = SINGLE_PROCESS
) -> str:
    """Say how long `steps` and evaluations on `val_tokens` will take, from dry runs."""
    # On a CPU a few sequences suffice, where a full micro-batch would take minutes.
    few = max(1, 2048 // config.context_length)
    is_fast = step.is_compiled or step.device.type == "cuda"
    sequences = step.micro_batch_size if is_fast else min(step.micro_batch_size, few)
    seconds = dry_run(step, sequences, config.context_length)
    # Decided together: under FSDP a dry run takes all ranks.
    if comm.all_true(seconds < 1):
        # The first run of a shape includes one-time costs.
        seconds = min(dry_run(step, sequences, config.context_length) for _ in range(2))
    per_sequence = seconds / sequences / comm.world_size
    per_step = per_sequence * config.global_batch_size + time_optimizer(step)
    evaluations = 1 + (steps - 1) // config.eval_every
    # The forward is a third of a step's FLOPs.
    eval_seconds = per_sequence / config.context_length * val_tokens / 3 * evaluations
    total = per_step * steps + eval_seconds
    advice = ""
    if step.device.type == "cpu" and total > SLOW_RUN_SECONDS:
        advice = "; a CPU is slow for that: use fewer --max_steps, or --preset shakespeare-cpu"
    if eval_seconds > max(total / 5, 10):
        times = f"{evaluations:,} evaluations" if evaluations > 1 else "the evaluation"
        advice += (
            f"; about {format_duration(eval_seconds)} of it for {times} on {val_tokens:,} held-out "
            "tokens, which --eval_every and --eval_tokens change"
        )
    return (
        f"this will take about {format_duration(total)}: {steps:,} steps of "
        f"{config.tokens_per_step:,} tokens, {num_params(config.model):,} parameters{advice}"
    )
