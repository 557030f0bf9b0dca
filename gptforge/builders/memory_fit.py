"""Does it fit into memory: micro-batch and sharding, and what would fit if nothing does."""

import dataclasses
import logging
from collections.abc import Callable, Collection

import torch

from gptforge.config import Config
from gptforge.device import Precision, usable_memory
from gptforge.distributed import Comm
from gptforge.errors import RunError, UserError
from gptforge.estimate.formulas import fsdp_memory, num_params, training_memory, zero1_memory
from gptforge.kernel_select import select_kernels
from gptforge.presets import AUTO, FINETUNE, PRESETS, get_preset
from gptforge.training.dry_run import fits_memory
from gptforge.training.train_step import TrainStep

logger = logging.getLogger(__name__)

MAX_MEMORY_FRACTION = 0.92
"""Fraction of the free memory that an estimate may fill; the rest is for fragmentation."""
MIN_BUSY_TOKENS = 4096  # tokens in a micro-batch that keep a large GPU busy
MIN_CONTEXT_LENGTH = 64  # shortest context length that is suggested


def first_fit(size: int, fits: Callable[[int], bool]) -> int:
    """Return the first of size, size / 2, size / 4, ..., 1 that fits; 0 if none does."""
    while not fits(size):
        if size == 1:
            return 0
        size = -(-size // 2)
    return size


def choose_micro_batch(step: TrainStep, config: Config, comm: Comm, *, is_explicit: bool) -> int:
    """Sequences per forward pass: `--batch_size`, or less if it is not explicit and memory short.

    A GPU tries sizes out, unless the model is sharded.
    """
    manual, is_gpu = step.kernels.manual_backward, step.device.type == "cuda"
    per_rank = config.global_batch_size // comm.world_size
    batch_size = min(config.batch_size, per_rank)
    if is_explicit:
        return batch_size

    def estimate(sequences: int) -> int:
        is_mixed, ranks = step.precision.is_mixed, comm.world_size
        if step.is_sharded and manual:
            return zero1_memory(config, sequences, world_size=ranks)
        if step.is_sharded:
            return fsdp_memory(config, sequences, world_size=ranks, mixed_precision=is_mixed)
        kinds = training_memory(config, sequences, mixed_precision=is_mixed, manual_backward=manual)
        return sum(kinds.values())

    # Sharding frees memory, and larger micro-batches gather weights less often.
    max_size = per_rank if step.is_sharded and is_gpu else batch_size
    free = usable_memory(step.device)
    # Estimates are free, each trial below costs a forward and backward pass.
    size = first_fit(max_size, lambda n: _fits(estimate(n), free)) or 1
    # Ranks of a sharded model would wait for one that runs out of memory, and on a CPU the kernel
    # kills the process.
    if is_gpu and not step.is_sharded:
        size = first_fit(size, lambda n: fits_memory(step, n, config.context_length))
    if not size:
        raise RunError(
            f"not even one sequence fits into the {(free or 0) / 1e9:.1f} GB of free memory: use "
            "--activation_checkpointing true, a smaller --context_length or a smaller model"
        )
    return size


def fits_zero1(config: Config, device: torch.device, explicit: Collection[str], comm: Comm) -> bool:
    """Whether every rank has memory for unsharded compute weights and gradients, which is faster.

    Only if a micro-batch of at least MIN_BUSY_TOKENS fits beside them.
    """
    per_rank = config.global_batch_size // comm.world_size
    min_sequences = -(-MIN_BUSY_TOKENS // config.context_length)
    if "batch_size" in explicit:
        min_sequences = config.batch_size
    needed = zero1_memory(config, min(per_rank, min_sequences), world_size=comm.world_size)
    return comm.all_true(_fits(needed, usable_memory(device)))


def _fits(needed: int, free: int | None) -> bool:
    return free is None or needed <= MAX_MEMORY_FRACTION * free


def use_fsdp(config: Config, device: torch.device, precision: Precision, comm: Comm) -> bool:
    """Whether to shard the model over the ranks (FSDP) instead of replicating it (DDP).

    Raises:
        UserError: if sharding is requested or needed, and does not work with another flag.
    """
    if comm.world_size == 1:
        if config.parallel == "fsdp":
            raise UserError(
                "--parallel fsdp shards a model over several ranks: start them with torchrun "
                "--nproc_per_node=N, or leave it out"
            )
        return False
    is_sharded, reason = config.parallel == "fsdp", "as requested"
    if config.parallel == "auto" and config.teachers:
        reason = "teachers need a full copy on each"
    elif config.parallel == "auto":
        memory = training_memory(config, 1, mixed_precision=precision.is_mixed)
        needed = sum(memory.values())
        free = usable_memory(device) if device.type == "cuda" else None
        is_sharded = not comm.all_true(_fits(needed, free))
        reason = "the model fits on each"
        if is_sharded:
            reason = f"a full copy takes {needed / 1e9:.1f} GB"
    if is_sharded and precision.needs_scaler:
        raise UserError(
            "--dtype float16 does not work with --parallel fsdp, which has no loss scaling: "
            "use --dtype bfloat16 or float32, or --parallel ddp"
        )
    if is_sharded and config.optimizer == "muon":
        raise UserError(
            f"--optimizer muon needs unsharded matrices, and the model would be sharded "
            f"({reason}): use --optimizer adamw, or --parallel ddp if it fits on each rank"
        )
    kind = "fsdp, the model sharded over" if is_sharded else "ddp, a copy of the model on each of"
    logger.info(f"parallel: {kind} {comm.world_size} ranks; {reason}")
    return is_sharded


def check_fits_memory(
    config: Config, device: torch.device, precision: Precision, *, is_explicit: bool
) -> None:
    """Raise a UserError if a CPU's memory is too small, where the kernel would kill the process.

    Only what is far too large is refused, since the estimate is an upper one. A GPU raises
    OutOfMemoryError itself.
    """
    free = usable_memory(device)
    if device.type == "cuda" or free is None:
        return
    sequences = config.batch_size if is_explicit else 1
    memory = training_memory(config, sequences, mixed_precision=precision.is_mixed)
    needed = sum(memory.values()) - memory["snapshot"] - memory["activations"] // 2
    if needed <= free:
        return
    sizes = f"at least {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if sequences > 1:
        raise UserError(
            f"--batch_size {sequences} takes {sizes}: leave it out to use the largest micro-batch "
            "that fits, with the same result"
        )
    raise UserError(
        f"this model takes {sizes}, even with a micro-batch of 1: use a smaller model or a "
        "shorter --context_length; gptforge plan says what would fit"
    )


def out_of_memory_hint(step: TrainStep, config: Config) -> str:
    """Say that a micro-batch is too large, and which one fits; tries them without torch.compile."""
    size = step.micro_batch_size
    if step.is_sharded:
        return (
            f"micro-batches of {size} do not fit into the memory of {step.device}: "
            "use a smaller --batch_size with more --gradient_accumulation_steps, or "
            "--activation_checkpointing true"
        )
    step.set_kernels(step.kernels)
    too_large = f"--batch_size {size} does not fit into the memory of {step.device}"
    for smaller in _smaller_micro_batches(config, size):
        if fits_memory(step, smaller, config.context_length):
            return f"{too_large}; {_equivalent_flags(config, smaller)}"
    return f"{too_large}, nor does less: use a smaller --context_length or model"


def _smaller_micro_batches(config: Config, size: int) -> list[int]:
    """Micro-batches below `size`, largest first, that keep the global batch."""
    return [n for n in range(size - 1, 0, -1) if config.global_batch_size % n == 0]


def _equivalent_flags(config: Config, micro_batch: int) -> str:
    return (
        f"--batch_size {micro_batch} --gradient_accumulation_steps "
        f"{config.global_batch_size // micro_batch} would, with the same result"
    )


class MemoryEstimator:
    """Memory that a configuration takes on a device, estimated without running it."""

    def __init__(self, config: Config, precision: Precision, device: torch.device) -> None:
        self._config, self._precision, self._device = config, precision, device
        self.free_memory = usable_memory(device)

    def memory(self, sequences: int, config: Config | None = None) -> dict[str, int]:
        """Bytes with micro-batches of `sequences`, by what takes them."""
        config = config or self._config
        kernels = select_kernels(config, self._device, self._precision)
        return training_memory(
            config,
            sequences,
            mixed_precision=self._precision.is_mixed,
            manual_backward=kernels.manual_backward,
        )

    def fits(self, sequences: int, config: Config | None = None) -> bool:
        """Whether micro-batches of `sequences` fit into the free memory."""
        return _fits(sum(self.memory(sequences, config).values()), self.free_memory)

    def micro_batch(self, explicit: Collection[str]) -> int:
        """The micro-batch that training starts with, before it tries it on a GPU."""
        if "batch_size" in explicit:
            return self._config.batch_size
        return first_fit(self._config.batch_size, self.fits) or 1

    def suggest_fix(self, sequences: int, *, is_explicit: bool) -> str:
        """Say what would fit, with the smallest change first."""
        c = self._config
        smaller = _smaller_micro_batches(c, sequences) if is_explicit else []
        for n in smaller:
            if self.fits(n):
                return f"micro-batches of {sequences} do not fit; {_equivalent_flags(c, n)}"
        checkpointing: dict[str, bool | int] = {"activation_checkpointing": True}
        if c.dropout and self._precision.float8:
            checkpointing = {}  # fp8 has no activation checkpointing with dropout
        lengths = [c.context_length // 2**n for n in range(1, 20)]
        changes = [checkpointing, {**checkpointing, "loss_chunk": 1024}] + [
            {**checkpointing, "context_length": n} for n in lengths if n >= MIN_CONTEXT_LENGTH
        ]
        for change in filter(None, changes):
            if self.fits(1, dataclasses.replace(c, **change)):
                flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
                batch_size = " --batch_size 1" if is_explicit else ""
                return f"not even a micro-batch of 1 fits; {flags}{batch_size} would"
        state = sum(self.memory(0).values())
        return (
            f"weights, gradients, optimizer and a snapshot alone take {state / 1e9:.1f} GB; use a "
            f"smaller model{self._smaller_preset()}, or shard it over several GPUs (torchrun)"
        )

    def _smaller_preset(self) -> str:
        sizes = {}
        for name in PRESETS.keys() - {AUTO, FINETUNE}:  # the sizes of these two vary
            config = dataclasses.replace(get_preset(name), vocab_size=self._config.vocab_size)
            if self.fits(1, config):
                sizes[name] = num_params(config.model)
        limit = num_params(self._config.model)
        smaller = [name for name, size in sizes.items() if size < limit]
        return f" (--preset {max(smaller, key=sizes.__getitem__)} would fit)" if smaller else ""
