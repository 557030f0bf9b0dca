"""Time training steps on random tokens: after a warmup, interleaved, medians of repeats."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptforge.config import Config
from gptforge.device import peak_flops, synchronize
from gptforge.estimate.formulas import flops_per_token

StepFn = Callable[[Tensor, Tensor], object]
MIN_REPEAT_SECONDS = 1.0
"""Least duration of a repeat, so that clocks and synchronization cost little."""
WARMUP_STEPS = 3


@dataclass(frozen=True)
class TrainSpeed:
    """Measurements of one implementation."""

    implementation: str
    seconds: tuple[float, ...]
    """Of a step, one value per repeat."""
    first_step_seconds: float
    """Of the first step, with compilation and kernel selection."""
    peak_memory: int | None
    """Most bytes that tensors of this implementation took on the GPU."""

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def random_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, each (G, T); the time does not depend on the tokens."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.global_batch_size, config.context_length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def time_interleaved(
    factories: Mapping[str, Callable[[], StepFn]],
    batch: tuple[Tensor, Tensor],
    *,
    repeats: int,
    device: torch.device,
) -> list[TrainSpeed]:
    """Time implementations in alternation, so that a drift of the machine affects all alike.

    Args:
        factories: build each implementation; the weights of the first are on the device already.
        batch: inputs and targets, each (G, T).
        repeats: of each implementation.
        device: of the batch.
    """
    is_gpu = device.type == "cuda"
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
        _run(steps[name], batch, 1, device)
        first_step[name] = time.perf_counter() - start
        _run(steps[name], batch, WARMUP_STEPS - 1, device)
        if is_gpu:
            peak_memory[name] = torch.cuda.max_memory_allocated(device) - allocated
    counts = {
        name: max(1, round(MIN_REPEAT_SECONDS / _run(step, batch, 1, device)))
        for name, step in steps.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(_run(step, batch, counts[name], device) / counts[name])
    return [
        TrainSpeed(name, tuple(seconds[name]), first_step[name], peak_memory.get(name))
        for name in steps
    ]


def summarize(
    speed: TrainSpeed, reference: TrainSpeed, config: Config, device: torch.device
) -> dict[str, Any]:
    """The results of one implementation, as `--json` prints them."""
    rate = config.tokens_per_step / speed.median
    flops = flops_per_token(config.model, config.context_length)
    peak = peak_flops(device)
    return {
        "implementation": speed.implementation,
        "gptforge_speedup": speed.median / reference.median,
        "tokens_per_second": rate,
        "ms_per_step": speed.median * 1e3,
        "ms_min": min(speed.seconds) * 1e3,
        "ms_max": max(speed.seconds) * 1e3,
        "flops_per_token": flops,
        "tflops_per_second": rate * flops / 1e12,
        "peak_tflops_per_second": peak / 1e12 if peak else None,
        "mfu": rate * flops / peak if peak else None,
        "first_step_seconds": speed.first_step_seconds,
        "peak_memory_bytes": speed.peak_memory,
    }


def profile(
    step_fn: StepFn, batch: tuple[Tensor, Tensor], folder: Path, *, rows: int = 25
) -> list[tuple[str, float, float]]:
    """Profile a step: name, ms and calls of each kernel, the longest first.

    Writes `trace.json` into the folder, for chrome://tracing or Perfetto.
    """
    is_gpu = batch[0].is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU]
    if is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    _run(step_fn, batch, 1, batch[0].device)
    with torch.profiler.profile(activities=activities) as profiler:
        _run(step_fn, batch, 1, batch[0].device)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = profiler.key_averages()
    if is_gpu:
        kernels = [e for e in events if str(e.device_type).endswith("CUDA")]
        found = [(e.key, e.self_device_time_total / 1e3, float(e.count)) for e in kernels]
    else:
        found = [(e.key, e.self_cpu_time_total / 1e3, float(e.count)) for e in events]
    return sorted(found, key=lambda row: -row[1])[:rows]


def _run(step_fn: StepFn, batch: tuple[Tensor, Tensor], count: int, device: torch.device) -> float:
    """Seconds of `count` steps."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step_fn(*batch)
    synchronize(device)
    return time.perf_counter() - start
