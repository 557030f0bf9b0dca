"""Time generation from random prompts, interleaved with transformers' `generate` and its KV cache.

All implementations have the same weights, prompts, number of new tokens and sampling parameters.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
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
"""Generates this many tokens for each prompt; returns the seconds to the first, NaN if unknown."""


def time_generation(
    generators: Mapping[str, GenerateFn],
    *,
    batch: int,
    vocab_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time implementations in alternation, after one run of each as a warmup.

    Returns results as `--json` prints them; the first implementation is the speedup's reference.
    """
    rng = torch.Generator().manual_seed(0)
    shape = (batch, prompt_tokens)
    prompts: Prompts = torch.randint(0, vocab_size, shape, generator=rng).tolist()
    for generate in generators.values():
        generate(prompts, new_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    first_token: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(repeats):
        for name, generate in generators.items():
            synchronize(device)
            start = time.perf_counter()
            first_token[name].append(generate(prompts, new_tokens))
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = batch * new_tokens
    results = []
    for name, median in medians.items():
        first = statistics.median(first_token[name])
        results.append(
            {
                "implementation": name,
                "batch": batch,
                "prompt": prompt_tokens,
                "new_tokens": new_tokens,
                "tokens_per_second": tokens / median,
                "tokens_per_second_min": tokens / max(seconds[name]),
                "tokens_per_second_max": tokens / min(seconds[name]),
                "ms_to_first": None if math.isnan(first) else first * 1e3,
                "gptforge_speedup": median / next(iter(medians.values())),
            }
        )
    return results


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
    """Generate with transformers' GPT2LMHeadModel and KV cache, from the same weights."""
    device = next(model.parameters()).device
    hf_model = transformers_model(model).to(device, dtype).eval()
    options = {"do_sample": True, "temperature": SAMPLING.temperature, "top_k": SAMPLING.top_k}
    options |= {"use_cache": True, "pad_token_id": 0}

    def generate(prompts: Prompts, new_tokens: int) -> float:
        ids = torch.tensor(prompts, device=device)
        lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        hf_model.generate(ids, attention_mask=torch.ones_like(ids), **lengths, **options)
        return math.nan

    return generate
