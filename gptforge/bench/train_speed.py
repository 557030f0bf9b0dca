"""Updates on random tokens, timed: warmed up, in turns, medians."""

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
from gptforge.estimate import formulas

StepFn = Callable[[Tensor, Tensor], object]
MIN_REPEAT_SECONDS = 1.0
"""Seconds that a turn takes at least: a clock, and waiting for the device, cost little then."""
WARMUP_STEPS = 3


@dataclass(frozen=True)
class TrainSpeed:
    """What was measured of one of those who took turns."""

    implementation: str
    seconds: tuple[float, ...]
    """Of an update, one figure a turn."""
    first_step_seconds: float
    """Of the first update: compiling, and finding kernels, included."""
    peak_memory: int | None
    """Most memory that tensors took on the GPU while this one was alone there."""

    @property
    def median(self) -> float:
        """Seconds of an update."""
        return statistics.median(self.seconds)


def random_batch(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each (G, T): the time does not depend on what the tokens say."""
    dice = torch.Generator().manual_seed(config.seed)
    shape = (config.global_batch_size, config.context_length + 1)
    tokens = torch.randint(0, config.vocab_size, shape, generator=dice).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def time_interleaved(
    factories: Mapping[str, Callable[[], StepFn]],
    batch: tuple[Tensor, Tensor],
    *,
    repeats: int,
    device: torch.device,
) -> list[TrainSpeed]:
    """Make each, warm it up, and let them take turns, so that a drift of the machine hits all.

    The first is the one whose weights are on the device already.
    """
    first: dict[str, float] = {}
    peak: dict[str, int] = {}
    updates: dict[str, StepFn] = {}
    for who, make in factories.items():
        # What those before it hold is not this one's.
        held = torch.cuda.memory_allocated(device) if updates and device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        updates[who] = make()
        _run(updates[who], batch, 1, device)
        first[who] = time.perf_counter() - begin
        _run(updates[who], batch, WARMUP_STEPS - 1, device)
        if device.type == "cuda":
            peak[who] = torch.cuda.max_memory_allocated(device) - held
    counts = {who: _steps_in_a_turn(update, batch, device) for who, update in updates.items()}
    seconds: dict[str, list[float]] = {who: [] for who in updates}
    for _ in range(repeats):
        for who, update in updates.items():
            seconds[who].append(_run(update, batch, counts[who], device) / counts[who])
    return [TrainSpeed(who, tuple(seconds[who]), first[who], peak.get(who)) for who in updates]


def summarize(
    speed: TrainSpeed, reference: TrainSpeed, config: Config, device: torch.device
) -> dict[str, Any]:
    """The figures of one, with what they are made of: what `--json` prints."""
    rate = config.tokens_per_step / speed.median
    per_token = formulas.flops_per_token(config.model, config.context_length)
    peak = peak_flops(device)
    return {
        "implementation": speed.implementation,
        "gptforge_speedup": speed.median / reference.median,
        "tokens_per_second": rate,
        "ms_per_step": speed.median * 1e3,
        "ms_min": min(speed.seconds) * 1e3,
        "ms_max": max(speed.seconds) * 1e3,
        "flops_per_token": per_token,
        "tflops_per_second": rate * per_token / 1e12,
        "peak_tflops_per_second": peak / 1e12 if peak else None,
        "mfu": rate * per_token / peak if peak else None,
        "first_step_seconds": speed.first_step_seconds,
        "peak_memory_bytes": speed.peak_memory,
    }


def profile(
    step_fn: StepFn, batch: tuple[Tensor, Tensor], folder: Path, *, rows: int = 25
) -> list[tuple[str, float, float]]:
    """Where the time of an update goes: name, ms and calls of each kernel, the longest first.

    Writes `trace.json` into the folder, for chrome://tracing or Perfetto.
    """
    on_gpu = batch[0].is_cuda
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    _run(step_fn, batch, 1, batch[0].device)
    with torch.profiler.profile(activities=kinds) as seen:
        _run(step_fn, batch, 1, batch[0].device)
    folder.mkdir(parents=True, exist_ok=True)
    seen.export_chrome_trace(str(folder / "trace.json"))
    averages = seen.key_averages()
    if on_gpu:
        # What runs on the CPU has no time of its own on the device, but for notes on waiting.
        kernels = [e for e in averages if str(e.device_type).endswith("CUDA")]
        found = [(e.key, e.self_device_time_total / 1e3, float(e.count)) for e in kernels]
    else:
        found = [(e.key, e.self_cpu_time_total / 1e3, float(e.count)) for e in averages]
    return sorted(found, key=lambda row: -row[1])[:rows]


def _run(update: StepFn, batch: tuple[Tensor, Tensor], steps: int, device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        update(*batch)
    synchronize(device)
    return time.perf_counter() - begin


def _steps_in_a_turn(update: StepFn, batch: tuple[Tensor, Tensor], device: torch.device) -> int:
    return max(1, round(MIN_REPEAT_SECONDS / _run(update, batch, 1, device)))
