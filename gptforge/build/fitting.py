"""What fits into a device's memory: how many windows at a time, and what would where none do."""

from collections.abc import Collection

import torch

from gptforge import costs
from gptforge.config import Config
from gptforge.distributed import Ranks
from gptforge.errors import UserError
from gptforge.hardware import PLAIN, Kernels, Precision, cache_folder, choose_kernels, usable_memory
from gptforge.train.micro_batch import HEADROOM, find_micro_batch
from gptforge.train.step import TrainStep

BUSY_TOKENS = 4096
"""Tokens at a time that keep a large GPU busy with a model that needs several of them."""


def kernels_of(config: Config, device: torch.device, precision: Precision) -> Kernels:
    """How updates of a configuration are computed, before anything is tried."""
    return choose_kernels(
        device,
        precision,
        compile_flag=config.compile,
        dropout=config.dropout,
        recompute=config.activation_checkpointing,
        activation=config.activation,
    )


def micro_batch(step: TrainStep, config: Config, ranks: Ranks, *, by_hand: bool) -> int:
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
    if step.kernels.by_hand:
        return _gathered_memory_of(config, windows, ranks)
    return costs.sharded_bytes(
        config.model,
        config.context_length,
        windows,
        ranks=ranks.size,
        mixed=step.precision.is_mixed,
        recompute=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def _gathered_memory_of(config: Config, windows: int, ranks: Ranks) -> int:
    return costs.gathered_bytes(
        config.model,
        config.context_length,
        windows,
        ranks=ranks.size,
        recompute=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def has_room_to_gather(
    config: Config, device: torch.device, given: Collection[str], ranks: Ranks
) -> bool:
    """Whether shards leave every rank room for whole narrow weights and gradients: it is faster.

    Room for fewer tokens at a time than keep a GPU's products busy is none.
    """
    own = config.global_batch // ranks.size
    enough = -(-BUSY_TOKENS // config.context_length)
    windows = min(own, config.batch_size if "batch_size" in given else enough)
    needed = _gathered_memory_of(config, windows, ranks)
    free = usable_memory(device)
    return ranks.all_of(free is None or needed <= HEADROOM * free)


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
