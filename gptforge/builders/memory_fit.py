"""What fits into a device's memory: how many windows at a time, and what would where none do."""

import dataclasses
from collections.abc import Collection

import torch

from gptforge.config import Config
from gptforge.device import Precision, usable_memory
from gptforge.distributed import Comm
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.estimate.plan import MemoryPlan
from gptforge.files import cache_dir
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig, select_kernels
from gptforge.presets import PRESETS, get_preset
from gptforge.train.micro_batch import MAX_MEMORY_FRACTION, find_micro_batch
from gptforge.train.train_step import TrainStep

MIN_BUSY_TOKENS = 4096
"""Tokens at a time that keep a large GPU busy with a model that needs several of them."""


def kernels_for(config: Config, device: torch.device, precision: Precision) -> KernelConfig:
    """How updates of a configuration are computed, before anything is tried."""
    return select_kernels(
        device,
        precision,
        compile_flag=config.compile,
        dropout=config.dropout,
        activation_checkpointing=config.activation_checkpointing,
        activation=config.activation,
    )


def choose_micro_batch(step: TrainStep, config: Config, comm: Comm, *, is_explicit: bool) -> int:
    """Windows that go through the model at once: those asked for, fewer where memory is short."""
    device, length = step.device, config.context_length
    own = config.global_batch_size // comm.world_size
    most = min(config.batch_size, own)
    is_gpu = device.type == "cuda"
    if is_explicit:
        return most
    name = str(device)
    if step.is_sharded:
        # A trial that failed on one rank would leave the others waiting: the estimate decides. With
        # the memory that sharding frees, more windows go through at a time, and weights are fetched
        # less often.
        return find_micro_batch(
            own if is_gpu else most,
            estimate=lambda windows: _sharded_memory_of(step, config, windows, comm),
            free_memory=usable_memory(device),
            fits=lambda n: True,
            cache_path=None,
            key="",
        )
    if is_gpu:
        name = torch.cuda.get_device_name(device)
    return find_micro_batch(
        most,
        estimate=lambda n: sum(estimate_memory(config, n, step.precision, step.kernels).values()),
        free_memory=usable_memory(device),
        # A machine that runs out of memory gives no error: it kills. So a CPU is not tried.
        fits=lambda n: not is_gpu or step.fits(n, length),
        cache_path=cache_dir() / "micro_batches.json" if is_gpu else None,
        key=f"{config.model} {length} {step.precision.dtype} {step.kernels.manual_backward} "
        f"{config.activation_checkpointing} {config.loss_chunk} {torch.__version__} {name}",
    )


def estimate_memory(
    config: Config, sequences: int, precision: Precision, kernels: KernelConfig
) -> dict[str, int]:
    """Bytes to train with so many windows at a time, by what they hold: an estimate from above."""
    return formulas.training_memory(
        config.model,
        config.context_length,
        sequences,
        mixed_precision=precision.is_mixed,
        manual_backward=kernels.manual_backward,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def _sharded_memory_of(step: TrainStep, config: Config, windows: int, ranks: Comm) -> int:
    """The same, in all, for a model that several ranks share."""
    if step.kernels.manual_backward:
        return _gathered_memory_of(config, windows, ranks)
    return formulas.fsdp_memory(
        config.model,
        config.context_length,
        windows,
        world_size=ranks.world_size,
        mixed_precision=step.precision.is_mixed,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def _gathered_memory_of(config: Config, windows: int, ranks: Comm) -> int:
    return formulas.zero1_memory(
        config.model,
        config.context_length,
        windows,
        world_size=ranks.world_size,
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk=config.loss_chunk,
    )


def fits_zero1(config: Config, device: torch.device, explicit: Collection[str], comm: Comm) -> bool:
    """Whether shards leave every rank room for whole narrow weights and gradients: it is faster.

    Room for fewer tokens at a time than keep a GPU's products busy is none.
    """
    own = config.global_batch_size // comm.world_size
    enough = -(-MIN_BUSY_TOKENS // config.context_length)
    windows = min(own, config.batch_size if "batch_size" in explicit else enough)
    needed = _gathered_memory_of(config, windows, comm)
    free = usable_memory(device)
    return comm.all_true(free is None or needed <= MAX_MEMORY_FRACTION * free)


def check_fits_memory(
    config: Config, device: torch.device, precision: Precision, *, is_explicit: bool
) -> None:
    """Raise a UserError if a CPU's memory cannot hold a run, which would be killed without a word.

    The estimate is from above, so that only what is far too large is refused. A GPU says by itself
    when its memory is full.
    """
    free = usable_memory(device)
    if device.type == "cuda" or free is None:
        return
    windows = config.batch_size if is_explicit else 1
    parts = estimate_memory(config, windows, precision, DEFAULT_KERNELS)
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


def out_of_memory_hint(step: TrainStep, config: Config) -> str:
    """Words for a micro-batch that is too large, with one that is not; tried out, not compiled."""
    if step.is_sharded:
        return (
            f"micro-batches of {step.micro_batch_size} do not fit into the memory of {step.device}: "
            "give a smaller --batch_size with more --gradient_accumulation_steps, or "
            "--activation_checkpointing true"
        )
    step.set_kernels(step.kernels)
    # Only a divisor keeps the global batch, and with it what is learned.
    smaller = [
        n for n in range(step.micro_batch_size - 1, 0, -1) if config.global_batch_size % n == 0
    ]
    fitting = next((n for n in smaller if step.fits(n, config.context_length)), None)
    too_large = (
        f"--batch_size {step.micro_batch_size} does not fit into the memory of {step.device}"
    )
    if fitting is None:
        return f"{too_large}, nor does less: use a smaller --context_length or model"
    return (
        f"{too_large}; --batch_size {fitting} --gradient_accumulation_steps "
        f"{config.global_batch_size // fitting} would, and learns the same"
    )


MIN_CONTEXT_LENGTH = 64
"""Tokens of a window below which no shorter one is advised."""


class MemoryEstimator:
    """Memory that a configuration takes on a device, by the formula; nothing is tried out."""

    def __init__(self, config: Config, precision: Precision, device: torch.device) -> None:
        self._config, self._precision, self._device = config, precision, device
        self._free = usable_memory(device)

    def estimate(self, sequences: int, device_name: str) -> MemoryPlan:
        """What so many windows at a time take, of what there is."""
        parts = self._parts(self._config, sequences)
        fits = self._do_fit(self._config, sequences)
        return MemoryPlan(device_name, sum(parts.values()), parts, self._free, fits)

    def micro_batch(self) -> int:
        """As training chooses it, before it tries it out on a GPU."""
        return find_micro_batch(
            self._config.batch_size,
            estimate=lambda windows: sum(self._parts(self._config, windows).values()),
            free_memory=self._free,
            fits=lambda windows: True,
            cache_path=None,
            key="",
        )

    def suggest_fix(self, sequences: int, *, is_explicit: bool) -> str:
        """What would fit, of what can be changed; the least first."""
        c, total = self._config, self._config.global_batch_size
        smaller = [n for n in range(sequences - 1, 0, -1) if total % n == 0] if is_explicit else []
        for n in smaller:
            if self._do_fit(c, n):
                return (
                    f"micro-batches of {sequences} do not fit; --batch_size {n} "
                    f"--gradient_accumulation_steps {total // n} would, and learns the same"
                )
        changes: list[dict[str, bool | int]] = [{"activation_checkpointing": True}]
        changes.append({"activation_checkpointing": True, "loss_chunk": 1024})
        lengths = [c.context_length // 2**n for n in range(1, 20)]
        changes += [{**changes[0], "context_length": n} for n in lengths if n >= MIN_CONTEXT_LENGTH]
        for change in changes:
            if self._do_fit(dataclasses.replace(c, **change), 1):  # type: ignore[arg-type]
                flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
                own = " --batch_size 1" if is_explicit else ""
                return f"not even one window fits; {flags}{own} would"
        least = sum(self._parts(c, 0).values())
        return (
            f"weights, gradients, optimizer and a snapshot alone take {least / 1e9:.1f} GB; use a "
            f"smaller model{self._smaller_preset()}, or several GPUs that share this one (torchrun)"
        )

    def _smaller_preset(self) -> str:
        here = formulas.num_params(self._config.model)
        others = {
            name: dataclasses.replace(get_preset(name), vocab_size=self._config.vocab_size)
            for name in PRESETS
        }
        sizes = {name: formulas.num_params(other.model) for name, other in others.items()}
        fitting = [n for n in others if sizes[n] < here and self._do_fit(others[n], 1)]
        largest = max(fitting, key=lambda name: sizes[name], default="")
        return f" (--preset {largest} would fit)" if largest else ""

    def _do_fit(self, config: Config, windows: int) -> bool:
        needed = sum(self._parts(config, windows).values())
        return self._free is None or needed <= MAX_MEMORY_FRACTION * self._free

    def _parts(self, config: Config, windows: int) -> dict[str, int]:
        kernels = kernels_for(config, self._device, self._precision)
        return estimate_memory(config, windows, self._precision, kernels)
