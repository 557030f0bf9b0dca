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

from gptforge.bench.baselines import transformers_model
from gptforge.device import synchronize
from gptforge.inference.generate import TokenGenerator
from gptforge.inference.sampling import SamplingParams, draw_uniforms
from gptforge.model import GPT

PROMPT_TOKENS = 32
NEW_TOKENS = 128
"""Both fewer where the model has fewer positions."""
SAMPLING = SamplingParams()

Prompts = list[list[int]]
GenerateFn = Callable[[Prompts, int], float]
"""Writes so many tokens to each prompt; gives the seconds to the first, or NaN if it cannot say."""


@dataclass(frozen=True)
class GenerateSpeed:
    """What was measured of one of those who took turns."""

    implementation: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    seconds: tuple[float, ...]
    """Of a whole batch, the reading of the prompts included; one figure a turn."""
    first_token_seconds: tuple[float, ...]
    """From the call to the first token on the host."""

    @property
    def median(self) -> float:
        """Seconds of a whole batch."""
        return statistics.median(self.seconds)

    def summarize(self, reference: "GenerateSpeed") -> dict[str, Any]:
        """The figures, with what they are made of: what `--json` prints."""
        tokens, first = self.batch * self.new_tokens, statistics.median(self.first_token_seconds)
        return {
            "implementation": self.implementation,
            "batch": self.batch,
            "prompt": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_second": tokens / self.median,
            "tokens_per_second_min": tokens / max(self.seconds),
            "tokens_per_second_max": tokens / min(self.seconds),
            "ms_to_first": first * 1e3 if first == first else None,
            "gptforge_speedup": self.median / reference.median,
        }


def time_generation(
    generators: Mapping[str, GenerateFn],
    *,
    batch: int,
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
) -> list[GenerateSpeed]:
    """Let each write once, which does not count, and then in turns, so that drift hits all."""
    dice = torch.Generator().manual_seed(0)
    prompts: Prompts = torch.randint(0, vocab_size, (batch, prompt_tokens), generator=dice).tolist()
    for write in generators.values():
        write(prompts, new_tokens)
    seconds: dict[str, list[float]] = {who: [] for who in generators}
    first: dict[str, list[float]] = {who: [] for who in generators}
    for _ in range(repeats):
        for who, write in generators.items():
            synchronize(device)
            begin = time.perf_counter()
            first[who].append(write(prompts, new_tokens))
            synchronize(device)
            seconds[who].append(time.perf_counter() - begin)
    return [
        GenerateSpeed(who, batch, prompt_tokens, new_tokens, tuple(seconds[who]), tuple(first[who]))
        for who in generators
    ]


def gptforge_generator(decoder: TokenGenerator) -> GenerateFn:
    """The way that `sample` writes."""

    def write(prompts: Prompts, new_tokens: int) -> float:
        dice = draw_uniforms(range(len(prompts)), new_tokens)
        begin = time.perf_counter()
        steps = decoder.generate(prompts, dice, SAMPLING)
        next(steps)
        first = time.perf_counter() - begin
        for _ in steps:
            pass
        return first

    return write


def transformers_generator(model: GPT, dtype: torch.dtype) -> GenerateFn:
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
