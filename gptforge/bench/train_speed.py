"""Time training steps on random tokens: after a warmup, interleaved, medians of repeats."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptforge.config import Config
from gptforge.device import peak_flops, synchronize
from gptforge.estimate.formulas import flops_per_token

StepFn = Callable[[Tensor, Tensor], object]
MIN_REPEAT_SECONDS = 1.0
"""Minimum duration of a repeat, so that clocks and synchronization cost little."""
WARMUP_STEPS = 3


def random_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, each (G, T); the time does not depend on the tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.global_batch_size, config.context_length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def time_training(
    factories: Mapping[str, Callable[[], StepFn]],
    batch: tuple[Tensor, Tensor],
    config: Config,
    *,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time implementations in alternation, so that a drift of the machine affects all alike.

    `factories` build the implementations; the weights of the first are on the device already.
    Returns results as `--json` prints them; the first is the reference of the speedup.
    """
    device, is_gpu = batch[0].device, batch[0].is_cuda
    first_step: dict[str, float] = {}
    peak_memory: dict[str, int] = {}
    steps: dict[str, StepFn] = {}
    for name, build in factories.items():
        # Memory of the implementations before this one is not counted.
        allocated = torch.cuda.memory_allocated(device) if steps and is_gpu else 0
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        steps[name] = build()
        _run(steps[name], batch, 1)
        first_step[name] = time.perf_counter() - start
        _run(steps[name], batch, WARMUP_STEPS - 1)
        if is_gpu:
            peak_memory[name] = torch.cuda.max_memory_allocated(device) - allocated
    counts = {
        name: max(1, round(MIN_REPEAT_SECONDS / _run(step, batch, 1)))
        for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(_run(step, batch, counts[name]) / counts[name])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops, peak = flops_per_token(config.model, config.context_length), peak_flops(device)
    results = []
    for name, median in medians.items():
        rate = config.tokens_per_step / median
        results.append(
            {
                "implementation": name,
                "gptforge_speedup": median / next(iter(medians.values())),
                "tokens_per_second": rate,
                "ms_per_step": median * 1e3,
                "ms_min": min(seconds[name]) * 1e3,
                "ms_max": max(seconds[name]) * 1e3,
                "flops_per_token": flops,
                "tflops_per_second": rate * flops / 1e12,
                "peak_tflops_per_second": peak / 1e12 if peak else None,
                "mfu": rate * flops / peak if peak else None,
                "first_step_seconds": first_step[name],
                "peak_memory_bytes": peak_memory.get(name),
            }
        )
    return results


def profile(
    step_fn: StepFn, batch: tuple[Tensor, Tensor], folder: Path
) -> list[tuple[str, float, float]]:
    """Profile a step: name, ms and calls of all kernels, those that take longest first.

    Writes `trace.json` into the folder, for chrome://tracing or Perfetto.
    """
    _run(step_fn, batch, 1)
    with torch.profiler.profile() as profiler:
        _run(step_fn, batch, 1)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = profiler.key_averages()
    if batch[0].is_cuda:
        kernels = [e for e in events if str(e.device_type).endswith("CUDA")]
        found = [(e.key, e.self_device_time_total / 1e3, float(e.count)) for e in kernels]
    else:
        found = [(e.key, e.self_cpu_time_total / 1e3, float(e.count)) for e in events]
    return sorted(found, key=lambda row: -row[1])


def _run(step_fn: StepFn, batch: tuple[Tensor, Tensor], count: int) -> float:
    """Seconds of `count` steps."""
    device = batch[0].device
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step_fn(*batch)
    synchronize(device)
    return time.perf_counter() - start
