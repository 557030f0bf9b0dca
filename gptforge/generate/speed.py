"""How fast a model writes: one measurement, for the benchmark and the command line alike."""

import statistics
import time
from dataclasses import dataclass

import torch

from gptforge.generate.decode import Decoder
from gptforge.generate.sampling import Sampling, throw_dice
from gptforge.hardware import synchronize


@dataclass(frozen=True)
class WritingSpeed:
    """What was measured, medians over the turns."""

    batch: int
    prompt: int
    new_tokens: int
    tokens_per_second: float
    """New tokens of the whole batch over the whole time, the reading of the prompts included."""
    ms_to_first: float
    """From the call to the first token on the host."""
    is_captured: bool
    """Whether steps were replayed as a CUDA graph."""


def measure_writing(
    decoder: Decoder,
    *,
    batch: int,
    prompt: int = 32,
    new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008  a frozen value
    turns: int = 5,
) -> WritingSpeed:
    """Write from random prompts `turns` times, after one time that does not count."""
    engine = decoder.engine
    dice = torch.Generator().manual_seed(0)
    rows = torch.randint(0, engine.size, (batch, prompt), generator=dice).tolist()
    throws = throw_dice(range(batch), new_tokens)
    totals, firsts = [], []
    for turn in range(turns + 1):
        synchronize(engine.device)
        begin = time.perf_counter()
        steps = decoder.decode(rows, throws, sampling)
        next(steps)
        first = time.perf_counter() - begin
        for _ in steps:
            pass
        synchronize(engine.device)
        if turn:
            totals.append(time.perf_counter() - begin)
            firsts.append(first)
    return WritingSpeed(
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        tokens_per_second=batch * new_tokens / statistics.median(totals),
        ms_to_first=statistics.median(firsts) * 1e3,
        is_captured=decoder.keeps_a_graph,
    )
