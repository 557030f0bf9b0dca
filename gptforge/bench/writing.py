"""Writing from random prompts, timed in turns; beside transformers' `generate` with its cache.

Those who take turns have the same weights, the same prompts and as many tokens to write, and draw
them in the same way.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptforge.bench.peers import transformers_model
from gptforge.generate.decode import Decoder
from gptforge.generate.sampling import Sampling, throw_dice
from gptforge.hardware import synchronize
from gptforge.model import GPT

PROMPT = 32
NEW_TOKENS = 128
"""Both fewer where the model has fewer positions."""
SAMPLING = Sampling()

Prompts = list[list[int]]
Write = Callable[[Prompts, int], float]
"""Writes so many tokens to each prompt; gives the seconds to the first, or NaN if it cannot say."""


@dataclass(frozen=True)
class WritingSpeed:
    """What was measured of one of those who took turns."""

    who: str
    batch: int
    prompt: int
    new_tokens: int
    seconds: tuple[float, ...]
    """Of a whole batch, the reading of the prompts included; one figure a turn."""
    first_seconds: tuple[float, ...]
    """From the call to the first token on the host."""

    @property
    def median(self) -> float:
        """Seconds of a whole batch."""
        return statistics.median(self.seconds)

    def facts(self, ours: "WritingSpeed") -> dict[str, Any]:
        """The figures, with what they are made of: what `--json` prints."""
        tokens, first = self.batch * self.new_tokens, statistics.median(self.first_seconds)
        return {
            "who": self.who,
            "batch": self.batch,
            "prompt": self.prompt,
            "new_tokens": self.new_tokens,
            "tokens_per_second": tokens / self.median,
            "tokens_per_second_from": tokens / max(self.seconds),
            "tokens_per_second_to": tokens / min(self.seconds),
            "ms_to_first": first * 1e3 if first == first else None,
            "ours_is_faster_by": self.median / ours.median,
        }


def write_in_turns(
    writers: Mapping[str, Write],
    *,
    batch: int,
    size: int,
    prompt: int,
    new_tokens: int,
    turns: int,
    device: torch.device,
) -> list[WritingSpeed]:
    """Let each write once, which does not count, and then in turns, so that drift hits all."""
    dice = torch.Generator().manual_seed(0)
    prompts: Prompts = torch.randint(0, size, (batch, prompt), generator=dice).tolist()
    for write in writers.values():
        write(prompts, new_tokens)
    seconds: dict[str, list[float]] = {who: [] for who in writers}
    first: dict[str, list[float]] = {who: [] for who in writers}
    for _ in range(turns):
        for who, write in writers.items():
            synchronize(device)
            begin = time.perf_counter()
            first[who].append(write(prompts, new_tokens))
            synchronize(device)
            seconds[who].append(time.perf_counter() - begin)
    return [
        WritingSpeed(who, batch, prompt, new_tokens, tuple(seconds[who]), tuple(first[who]))
        for who in writers
    ]


def ours(decoder: Decoder) -> Write:
    """The way that `sample` writes."""

    def write(prompts: Prompts, new_tokens: int) -> float:
        dice = throw_dice(range(len(prompts)), new_tokens)
        begin = time.perf_counter()
        steps = decoder.decode(prompts, dice, SAMPLING)
        next(steps)
        first = time.perf_counter() - begin
        for _ in steps:
            pass
        return first

    return write


def theirs(model: GPT, dtype: torch.dtype) -> Write:
    """`generate` of transformers' GPT2LMHeadModel with its cache, on the same weights.

    Raises:
        UserError: if transformers is not there.
    """
    device = next(model.parameters()).device
    peer = transformers_model(model).to(device, dtype).eval()
    how = {"do_sample": True, "temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k}

    def write(prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=0,
            **how,
        )
        return float("nan")

    return write
