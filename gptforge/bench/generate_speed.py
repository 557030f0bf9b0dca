"""Time generation from random prompts, interleaved with transformers' `generate` and its KV cache.

All implementations have the same weights, prompts, number of new tokens and sampling parameters.
"""

import math
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
"""Both are reduced for a model with fewer positions."""
SAMPLING = SamplingParams()

Prompts = list[list[int]]
GenerateFn = Callable[[Prompts, int], float]
"""Generates so many tokens for each prompt; returns the seconds to the first, NaN if unknown."""


@dataclass(frozen=True)
class GenerateSpeed:
    """Measurements of one implementation."""

    implementation: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    seconds: tuple[float, ...]
    """Of a batch, with the prefill; one value per repeat."""
    first_token_seconds: tuple[float, ...]
    """From the call to the first token on the host; NaN if unknown."""

    @property
    def median(self) -> float:
        """Median seconds of a batch."""
        return statistics.median(self.seconds)

    def summarize(self, reference: "GenerateSpeed") -> dict[str, Any]:
        """The results, as `--json` prints them."""
        tokens, first = self.batch * self.new_tokens, statistics.median(self.first_token_seconds)
        return {
            "implementation": self.implementation,
            "batch": self.batch,
            "prompt": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "tokens_per_second": tokens / self.median,
            "tokens_per_second_min": tokens / max(self.seconds),
            "tokens_per_second_max": tokens / min(self.seconds),
            "ms_to_first": None if math.isnan(first) else first * 1e3,
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
    """Time implementations in alternation, after one run of each as a warmup."""
    rng = torch.Generator().manual_seed(0)
    shape = (batch, prompt_tokens)
    prompts: Prompts = torch.randint(0, vocab_size, shape, generator=rng).tolist()
    for generate in generators.values():
        generate(prompts, new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    first: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(repeats):
        for name, generate in generators.items():
            synchronize(device)
            start = time.perf_counter()
            first[name].append(generate(prompts, new_tokens))
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return [
        GenerateSpeed(
            name, batch, prompt_tokens, new_tokens, tuple(seconds[name]), tuple(first[name])
        )
        for name in generators
    ]


def gptforge_generator(generator: TokenGenerator) -> GenerateFn:
    """Generate as `gptforge sample` does."""

    def generate(prompts: Prompts, new_tokens: int) -> float:
        uniforms = draw_uniforms(range(len(prompts)), new_tokens)
        start = time.perf_counter()
        steps = generator.generate(prompts, uniforms, SAMPLING)
        next(steps)
        first = time.perf_counter() - start
        for _ in steps:
            pass
        return first

    return generate


def transformers_generator(model: GPT, dtype: torch.dtype) -> GenerateFn:
    """Generate with transformers' GPT2LMHeadModel and KV cache, from the same weights.

    Raises:
        UserError: if transformers is not installed.
    """
    device = next(model.parameters()).device
    hf_model = transformers_model(model).to(device, dtype).eval()
    sampling = {"do_sample": True, "temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k}

    def generate(prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        hf_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            use_cache=True,
            pad_token_id=0,
            **sampling,
        )
        return math.nan

    return generate
