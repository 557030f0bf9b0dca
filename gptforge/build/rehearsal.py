"""How long an update takes here: measured in a few seconds, however large the model is."""

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from gptforge import costs
from gptforge.build.benchmark import build_step
from gptforge.config import Config
from gptforge.train.step import TrainStep

A_PASS = {"cuda": 1e14}
"""FLOPs that a pass may take on a device."""
A_PASS_ELSEWHERE = 1e12
"""The same on all others: 2 seconds on two cores with bfloat16."""
FEWEST_LAYERS = 4
"""Of a model too large for a pass: with fewer, an error grows too much on the way to all layers."""
PATIENCE = 4.0
"""Seconds after which no pass is made again; the first over a shape pays for warming up."""
ENOUGH = 1.0
"""Seconds after which three passes are enough."""
ALONE = 0.8
"""Share of the cores' time below which others must have wanted them: 0.97 to 1 was seen with nobody
else there, and 0.5 beside one busy program, which made a pass three to five times as slow."""


@dataclass(frozen=True)
class Rehearsal:
    """What was measured, and how."""

    seconds_a_window: float
    how: str


def rehearse(
    config: Config, given: Collection[str], *, device: torch.device, micro_batch: int
) -> Rehearsal:
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
    accumulation = max(1, config.global_batch // micro_batch)
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
    windows, depths = _few(config, micro_batch, A_PASS.get(device.type, A_PASS_ELSEWHERE))
    seconds, share, is_plain = [], 1.0, False
    for depth in depths:
        part = dataclasses.replace(config, n_layer=depth)
        step = build_step(part, {*given, "batch_size"}, lambda _: None)
        fastest, share = _passes(step, windows, config.context_length)
        seconds.append(fastest / windows)
        is_plain = not step.kernels.by_hand
        del step
    whole = seconds[-1]
    how = f"forward and backward of {windows} window{'s' * (windows > 1)}"
    if len(depths) > 1:
        a_layer = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
        whole += max(0.0, a_layer) * (total - depths[1])
        how += f" through {depths[0]} and {depths[1]} of {total} layers, continued to all"
    if may_be_compiled and is_plain:
        how += ", not compiled: that would have taken longer than all of this"
    if device.type == "cpu" and share < ALONE:
        how += f"; other programs took {1 - share:.0%} of the cores meanwhile: alone it is faster"
    return Rehearsal(whole, how)


def _few(config: Config, micro_batch: int, flops: float) -> tuple[int, list[int]]:
    """Windows and numbers of layers that so many FLOPs are enough for."""
    length, total = config.context_length, config.n_layer
    one, two, whole = (
        length * costs.flops_per_token(dataclasses.replace(config, n_layer=n).model, length)
        for n in (1, 2, total)
    )
    if total <= FEWEST_LAYERS or whole <= flops:
        return max(1, min(micro_batch, int(flops // whole))), [total]
    most = max(FEWEST_LAYERS, 1 + int((flops - one) // (two - one)))
    return 1, [1, most]


def _passes(step: TrainStep, windows: int, context_length: int) -> tuple[float, float]:
    """Seconds of the fastest pass, and the share of the cores' time that all of them had."""
    taken: list[float] = []
    begun = time.process_time()
    while sum(taken) < PATIENCE and (len(taken) < 3 or sum(taken) < ENOUGH):
        taken.append(step.rehearse(windows, context_length))
    share = (time.process_time() - begun) / (sum(taken) * torch.get_num_threads())
    return min(taken), share
