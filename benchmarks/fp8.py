"""Time of a GPT-2 small step with matmuls in bfloat16 and in variants of fp8.

    python benchmarks/fp8.py

131,072 tokens a step, all variants interleaved in one process; then the kernels of a step by kind,
and the matmuls of each layer at the shapes of a micro-batch. `fp8_learning.py` trains the variants.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from unittest import mock

import torch
from kernel_choices import time_interleaved
from torch import Tensor

from gptforge.config import Config, GPTConfig
from gptforge.device import Precision
from gptforge.kernel_select import select_kernels
from gptforge.kernels import float8_matmul, matmul
from gptforge.kernels.float8 import E4M3, E5M2, Float8Tensor, cast_transpose, empty_float8
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.training import train_step
from gptforge.training.backends.float8 import (
    Float8Backend,
    Float8Block,
    Float8Head,
    Float8Linear,
)
from gptforge.training.backends.manual import ManualHead
from gptforge.training.train_step import TrainStep

DEVICE = torch.device("cuda")
GPT2 = GPTConfig(1024, 50304, 12, 12, 768)
SEQUENCES, MICRO_BATCH, REPEATS, STEPS_PER_REPEAT = 128, 32, 4, 5
KINDS = {
    "attention": ("attn", "attention", "flash", "cudnn"),
    "casts and transposes to fp8": ("cast_transpose",),
    "matmuls": ("gemm", "nvjet", "cublas", "cutlass", "splitk"),
    "layer norm": ("layer_norm",),
    "cross-entropy": ("cross_entropy",),
    "gelu": ("gelu",),
}
"""Kinds of kernels by parts of their names; the first that matches."""


class Float8LogitsHead(Float8Head):
    def forward(self, hidden: Tensor) -> Tensor:
        return float8_matmul.float8_linear(quantize(hidden, E4M3).data, self._weight)


class Float8LogitsBackend(Float8Backend):
    """Logits from fp8, too."""

    head_class = Float8LogitsHead


class Bf16HeadBackend(Float8Backend):
    """All of the output layer in bfloat16."""

    head_class = ManualHead


class E4M3GradLinear(Float8Linear):
    def backward(self, x: Tensor, grad_output: Tensor) -> Tensor:
        amax = grad_output.abs().amax().float().clamp_min(1e-30)
        scaled = empty_float8(grad_output, E4M3, amax / torch.finfo(E4M3).max)
        return self.backward_float8(x, cast_transpose(grad_output, scaled))


class E4M3GradBlock(Float8Block):
    linear_class = E4M3GradLinear


class E4M3GradBackend(Float8Backend):
    """Gradients of all layers but c_fc in E4M3, scaled by their current maximum.

    Those of c_fc are in E5M2: the kernel of the GELU's backward writes them, before it knows their
    maximum.
    """

    block_class = E4M3GradBlock


VARIANTS: dict[str, tuple[str, type[Float8Backend], tuple[str, ...]]] = {
    "bf16": ("bfloat16", Float8Backend, ()),
    "fp8": ("fp8", Float8Backend, ("forward",)),
    "fp8, full accumulation": ("fp8", Float8Backend, ()),
    "fp8, logits in fp8": ("fp8", Float8LogitsBackend, ("forward",)),
    "fp8, head in bf16": ("fp8", Bf16HeadBackend, ("forward",)),
    "fp8, gradients of all but c_fc in E4M3": ("fp8", E4M3GradBackend, ("forward",)),
    "fp8, fast dgrad": ("fp8", Float8Backend, ("forward", "dgrad")),
    "fp8, all fast": ("fp8", Float8Backend, ("forward", "dgrad", "wgrad")),
}
"""`--dtype`, the backend of fp8, and the matmuls that sum less accurately."""


def build_variant(
    name: str,
    seed: int = 1,
    *,
    shape: GPTConfig = GPT2,
    micro_batch: int = MICRO_BATCH,
    device: torch.device = DEVICE,
) -> TrainStep:
    """Build a step, within `using_variant`."""
    torch.manual_seed(seed)
    precision = Precision(torch.bfloat16, "to compare", float8=VARIANTS[name][0] == "fp8")
    model = GPT(shape).init_weights(torch.Generator().manual_seed(seed)).to(device)
    return TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        Config(batch_size=micro_batch),
        precision=precision,
        kernels=select_kernels(Config(), DEVICE, precision),
    )


@contextlib.contextmanager
def using_variant(name: str) -> Iterator[None]:
    """Build and run fp8 backends as this variant says."""
    _, backend_class, fast_roles = VARIANTS[name]
    with (
        mock.patch.object(train_step, "Float8Backend", backend_class),
        fast_accumulation(fast_roles),
    ):
        yield


@contextlib.contextmanager
def fast_accumulation(roles: Collection[str]) -> Iterator[None]:
    """Sum less accurately in the matmuls of these roles only."""
    with mock.patch.dict(
        float8_matmul.FAST_ACCUM, {role: role in roles for role in float8_matmul.FAST_ACCUM}
    ):
        yield


class Steps:
    """Steps of a variant on random tokens."""

    def __init__(self, name: str) -> None:
        tokens = torch.randint(GPT2.vocab_size, (SEQUENCES, GPT2.block_size + 1), device=DEVICE)
        self._x, self._y = tokens[:, :-1], tokens[:, 1:]
        self._name = name
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with using_variant(name):
            self._step = build_variant(name)
        self.run(3)
        self.peak_gb = (torch.cuda.max_memory_allocated() - held) / 1e9

    def run(self, count: int) -> float:
        """Milliseconds of a step."""
        with using_variant(self._name):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                self._step(self._x, self._y, lr=1e-4)
            torch.cuda.synchronize()
            return 1e3 * (time.perf_counter() - start) / count

    def kernels(self) -> dict[str, float]:
        """Milliseconds of a step's kernels by kind."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            self.run(1)
        kinds = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in profiler.key_averages():
            name = event.key.lower()
            kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other")
            kinds[kind] += event.self_device_time_total / 1e3
        return kinds


def print_steps() -> None:
    steps = {name: Steps(name) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, variant in steps.items():
            times[name].append(variant.run(STEPS_PER_REPEAT))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print("\n| step | ms | lowest, highest | tokens/s | peak GB | speedup |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, values in times.items():
        rate = 1e3 * SEQUENCES * GPT2.block_size / medians[name]
        print(
            f"| {name} | {medians[name]:.1f} | {min(values):.1f}, {max(values):.1f} | {rate:,.0f} "
            f"| {steps[name].peak_gb:.1f} | {medians['bf16'] / medians[name]:.2f} |"
        )
    bf16, fp8 = steps["bf16"].kernels(), steps["fp8"].kernels()
    print("\n| kernels of a step, ms | bf16 | fp8 |\n| --- | --- | --- |")
    for kind in bf16:
        print(f"| {kind} | {bf16[kind]:.1f} | {fp8[kind]:.1f} |")
    print(f"| all | {sum(bf16.values()):.1f} | {sum(fp8.values()):.1f} |")


def quantize(x: Tensor, dtype: torch.dtype, scale_inv: float = 1.0) -> Float8Tensor:
    return cast_transpose(x, empty_float8(x, dtype, torch.tensor(scale_inv, device=x.device)))


def print_matmuls() -> None:
    tokens, c = MICRO_BATCH * GPT2.block_size, GPT2.n_embd
    layers = (
        ("c_attn", tokens, 3 * c, c), ("attn.c_proj", tokens, c, c), ("c_fc", tokens, 4 * c, c),
        ("mlp.c_proj", tokens, c, 4 * c), ("head", tokens // 4, GPT2.vocab_size, c),
    )  # fmt: skip
    print("\n| matmul, us | bf16 | fp8, fast | fp8, full |\n| --- | --- | --- | --- |")
    for name, rows, out, inner in layers:
        x = torch.randn(rows, inner, device=DEVICE).bfloat16()
        dy = torch.randn(rows, out, device=DEVICE).bfloat16() * 1e-6
        weight = torch.randn(out, inner, device=DEVICE).bfloat16() * 0.02
        bias, wgrad = dy[0].clone(), torch.zeros(out, inner, device=DEVICE)
        x8, dy8 = quantize(x, E4M3), quantize(dy, E5M2, 2.0**-20)
        w8 = quantize(weight, E4M3, 2.0**-10)
        roles: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "forward": (
                lambda x=x, w=weight, b=bias: matmul.linear(x, w, b),
                lambda x=x8, w=w8, b=bias: float8_matmul.float8_linear(x.data, w, b),
            ),
            "dgrad": (
                lambda dy=dy, w=weight: matmul.linear_dgrad(dy, w),
                lambda dy=dy8, w=w8: float8_matmul.float8_dgrad(dy, w),
            ),
            "wgrad": (
                lambda g=wgrad, dy=dy, x=x: matmul.accumulate_wgrad(g, dy, x),
                lambda g=wgrad, dy=dy8, x=x8: float8_matmul.accumulate_float8_wgrad(
                    g, dy, x.transpose
                ),
            ),
        }
        for role, (bf16, fp8) in roles.items():
            times = time_interleaved(bf16)
            for fast in ((role,), ()):
                with fast_accumulation(fast):
                    times += time_interleaved(fp8)
            print(f"| {name} {role} | {' | '.join(f'{t:.0f}' for t in times)} |", flush=True)


if __name__ == "__main__":
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print_steps()
    print_matmuls()
