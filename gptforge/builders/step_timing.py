"""How long an update takes here: measured in a few seconds, however large the model is."""

import dataclasses
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.train_step import build_train_step
from gptforge.builders.trainer import seed_everything
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.config import Config, validate
from gptforge.device import select_device, select_precision
from gptforge.estimate import formulas
from gptforge.model import GPT
from gptforge.train.train_step import TrainStep


def build_bench_step(
    config: Config, explicit: Collection[str], log: Callable[[str], None]
) -> TrainStep:
    """Model, optimizer and kernels, chosen as for training; writes nothing anywhere.

    Raises:
        UserError: for anything the user can mend.
    """
    validate(config)
    device, note = select_device(config.device)
    precision = select_precision(config.dtype, device)
    log(f"device: {device} ({note}), {precision.name}: {precision.reason}")
    seed_everything(config)
    # Behind what cuBLAS reads when it starts.
    warm_up = KernelWarmup(device, config, precision)
    opening = OpenedRun("new", config)
    return build_train_step(
        config, opening, device, precision, explicit=explicit, log=log, wait_for_warmup=warm_up.wait
    )


def build_random_model(config: Config, log: Callable[[str], None]) -> GPT:
    """A model with random weights, on its device, to write with.

    Raises:
        UserError: for anything the user can mend.
    """
    validate(config)
    device, note = select_device(config.device)
    log(f"device: {device} ({note})")
    seed_everything(config)
    with device:
        return GPT(config.model).init_weights().eval()


MAX_FLOPS = {"cuda": 1e14}
"""FLOPs that a pass may take on a device."""
DEFAULT_MAX_FLOPS = 1e12
"""The same on all others: 2 seconds on two cores with bfloat16."""
MIN_LAYERS = 4
"""Of a model too large for a pass: with fewer, an error grows too much on the way to all layers."""
MAX_SECONDS = 4.0
"""Seconds after which no pass is made again; the first over a shape pays for warming up."""
MIN_SECONDS = 1.0
"""Seconds after which three passes are enough."""
MIN_CPU_SHARE = 0.8
"""Share of the cores' time below which others must have wanted them: 0.97 to 1 was seen with nobody
else there, and 0.5 beside one busy program, which made a pass three to five times as slow."""


@dataclass(frozen=True)
class StepTiming:
    """What was measured, and how."""

    seconds_per_sequence: float
    how: str


def time_step(
    config: Config, explicit: Collection[str], *, device: torch.device, micro_batch: int
) -> StepTiming:
    """Time forward and backward of a model like this one, and leave no trace.

    All layers of GPT-2 are alike: of a model that is too large to be tried in seconds, one layer
    and a few are timed, and the line through both is followed to the whole.

    Args:
        config: settled; it has to fit into memory.
        given: fields set by hand.
        device: where.
        micro_batch: windows that would go through at once; no more are tried.

    Raises:
        RunError: if memory runs out all the same.
    """
    accumulation = max(1, config.global_batch_size // micro_batch)
    may_be_compiled = config.compile == "true" or (config.compile, device.type) == ("auto", "cuda")
    config = dataclasses.replace(
        config,
        init_from="",
        device=str(device),
        compile="false",
        batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
    )
    total = config.n_layer
    windows, depths = _few(config, micro_batch, MAX_FLOPS.get(device.type, DEFAULT_MAX_FLOPS))
    seconds, share, is_plain = [], 1.0, False
    for depth in depths:
        part = dataclasses.replace(config, n_layer=depth)
        step = build_bench_step(part, {*explicit, "batch_size"}, lambda _: None)
        fastest, share = _passes(step, windows, config.context_length)
        seconds.append(fastest / windows)
        is_plain = not step.kernels.manual_backward
        del step
    whole = seconds[-1]
    how = f"forward and backward of {windows} window{'s' * (windows > 1)}"
    if len(depths) > 1:
        a_layer = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
        whole += max(0.0, a_layer) * (total - depths[1])
        how += f" through {depths[0]} and {depths[1]} of {total} layers, continued to all"
    if may_be_compiled and is_plain:
        how += ", not compiled: that would have taken longer than all of this"
    if device.type == "cpu" and share < MIN_CPU_SHARE:
        how += f"; other programs took {1 - share:.0%} of the cores meanwhile: alone it is faster"
    return StepTiming(whole, how)


def _few(config: Config, micro_batch: int, flops: float) -> tuple[int, list[int]]:
    """Windows and numbers of layers that so many FLOPs are enough for."""
    length, total = config.context_length, config.n_layer
    one, two, whole = (
        length * formulas.flops_per_token(dataclasses.replace(config, n_layer=n).model, length)
        for n in (1, 2, total)
    )
    if total <= MIN_LAYERS or whole <= flops:
        return max(1, min(micro_batch, int(flops // whole))), [total]
    most = max(MIN_LAYERS, 1 + int((flops - one) // (two - one)))
    return 1, [1, most]


def _passes(step: TrainStep, windows: int, context_length: int) -> tuple[float, float]:
    """Seconds of the fastest pass, and the share of the cores' time that all of them had."""
    taken: list[float] = []
    begun = time.process_time()
    while sum(taken) < MAX_SECONDS and (len(taken) < 3 or sum(taken) < MIN_SECONDS):
        taken.append(step.dry_run(windows, context_length))
    share = (time.process_time() - begun) / (sum(taken) * torch.get_num_threads())
    return min(taken), share
