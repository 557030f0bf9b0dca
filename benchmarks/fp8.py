"""fp8 training on a GPU: is it right, how fast is each part, does it learn the same?

    python benchmarks/fp8.py input.txt --out fp8-results

--only runs some of these groups, or some of their parts:

- checks (casts, matmuls, model): kernels and matmuls against float64, and a model's gradients.
- step (steps, profiles): GPT-2 small, 131,072 tokens a step, bfloat16 beside fp8 and its variants,
  interleaved; then the 25 kernels of a step that take longest.
- kernels (matmul_times, cast_times, tiles): microseconds at the shapes of a micro-batch of 32
  sequences of 1024, and the casts with other tiles.
- learning (losses, rounding): GPT-2 small on the text, 32 sequences a step, two seeds of each; then
  the rounding errors of the casts.

A part that fails is reported, and the others run: in a new process if the GPU's context is lost.
The last table sums up. The folder gets it as summary.md, all tables as results.md, and all kernels
of a step as profile-bf16.txt and profile-fp8.txt.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fp8_kernels import (
    DEVICE,
    GPT2,
    Report,
    V,
    check_casts,
    check_matmuls,
    check_model,
    failing,
    patched,
    time_casts,
    time_matmuls,
    time_tiles,
)
from torch import Tensor

from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.device import select_precision
from gptforge.kernel_select import select_kernels
from gptforge.kernels import float8_matmul
from gptforge.kernels.float8 import Float8Tensor, cast_transpose, transpose
from gptforge.kernels.matmul import linear
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.tokenizers import from_name
from gptforge.train.backends import factory
from gptforge.train.backends import float8 as backend
from gptforge.train.backends.manual_layers import ComputeWeights, ManualHead
from gptforge.train.grad_buffer import GradBuffer
from gptforge.train.train_step import TrainStep

SEQUENCES, MICRO_BATCH, REPEATS, STEPS_PER_REPEAT = 128, 32, 4, 5
LOSS_STEPS, LOSS_SEQUENCES, VAL_SEQUENCES = 200, 32, 32
TOP_KERNELS = 25
KINDS = {
    "attention": ("attn", "attention", "flash", "fmha", "cudnn"),
    "casts and transposes to fp8": ("cast_transpose",),
    "matmuls": ("gemm", "nvjet", "cublas", "cutlass", "splitk"),
    "layer norm": ("layer_norm",),
    "cross-entropy": ("cross_entropy",),
    "gelu": ("gelu",),
    "embedding": ("embedding",),
    "sums over rows": ("column_sums", "accumulate"),
    "optimizer and other torch kernels": ("multi_tensor", "foreach", "elementwise", "reduce"),
}
"""Kinds of kernels by parts of their names; the first that matches."""


class Bf16HeadBackend(backend.Float8Backend):
    """fp8 with the output layer in bfloat16."""

    head_class = ManualHead

    def __init__(self, model: GPT, dtype: torch.dtype, **options: object) -> None:
        super().__init__(model, dtype, **options)
        self._ln_f.out_dtype = dtype


class Bf16LogitsHead(backend.Float8Head):
    """An output layer with logits in bfloat16, and fp8 in the backward."""

    def __init__(self, wte: Tensor, weights: ComputeWeights, grads: GradBuffer) -> None:
        super().__init__(wte, weights, grads)
        self._compute_weight = weights.compute_copy(wte)

    def forward(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self._compute_weight)

    def forward_backward(self, hidden: Tensor, *args: Any) -> Tensor:
        with patched(vars(backend), "transpose", transpose_activation):
            return super().forward_backward(hidden, *args)


def transpose_activation(x: Tensor) -> Tensor:
    """The transpose of `x` in fp8; `x` may be in bfloat16."""
    if x.dtype == torch.bfloat16:
        return backend._cast_activation(x).transpose
    return transpose(x)


class Bf16LogitsBackend(Bf16HeadBackend):
    """fp8 with the forward of the output layer in bfloat16."""

    head_class = Bf16LogitsHead


def build_step(dtype: str, *, seed: int = 1, shape: GPTConfig = GPT2) -> TrainStep:
    torch.manual_seed(seed)
    precision = select_precision(dtype, DEVICE)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(seed)).to(DEVICE)
    return TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        precision=precision,
        micro_batch_size=MICRO_BATCH,
        grad_clip=1.0,
        kernels=select_kernels(Config(), DEVICE, precision),
    )


def build_variant(backend_class: type[backend.Float8Backend], seed: int) -> TrainStep:
    with patched(vars(factory), "Float8Backend", backend_class):
        return build_step("fp8", seed=seed)


def build_fp8(seed: int) -> TrainStep:
    return build_step("fp8", seed=seed)


VARIANTS: dict[str, tuple[Callable[[int], TrainStep], tuple[str, ...]]] = {
    "bf16": (lambda seed: build_step("bfloat16", seed=seed), ("forward",)),
    "fp8": (build_fp8, ("forward",)),
    "fp8, full accumulation": (build_fp8, ()),
    "fp8, logits in bf16": (lambda seed: build_variant(Bf16LogitsBackend, seed), ("forward",)),
    "fp8, head in bf16": (lambda seed: build_variant(Bf16HeadBackend, seed), ("forward",)),
    "fp8, fast dgrad": (build_fp8, ("forward", "dgrad")),
    "fp8, all fast": (build_fp8, ("forward", "dgrad", "wgrad")),
}
"""What builds the step from a seed, and which matmuls sum less accurately."""


@contextlib.contextmanager
def fast_accumulation(roles: Collection[str]) -> Iterator[None]:
    """Sum less accurately in the matmuls of these roles only."""
    with contextlib.ExitStack() as stack:
        for role in tuple(float8_matmul.FAST_ACCUM):
            stack.enter_context(patched(float8_matmul.FAST_ACCUM, role, role in roles))
        yield


class Steps:
    """Steps of a variant on random tokens."""

    def __init__(self, name: str) -> None:
        tokens = torch.randint(V, (SEQUENCES, GPT2.block_size + 1), device=DEVICE)
        self._x, self._y = tokens[:, :-1], tokens[:, 1:]
        build, self._fast_roles = VARIANTS[name]
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._step = build(1)
        self.run(3)
        self.peak_gb = (torch.cuda.max_memory_allocated() - held) / 1e9

    def run(self, count: int) -> float:
        """Seconds of a step."""
        with fast_accumulation(self._fast_roles):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                self._step(self._x, self._y, lr=1e-4)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / count


def time_steps(report: Report) -> None:
    steps: dict[str, Steps] = {}
    for name in VARIANTS:
        with failing(report, f"step, {name}"):
            steps[name] = Steps(name)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, variant in steps.items():
            seconds[name].append(variant.run(STEPS_PER_REPEAT))
    report.heading("step", "ms", "lowest, highest", "tokens/s", "peak GB", "speedup")
    medians = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        rate = SEQUENCES * GPT2.block_size / medians[name] * 1e3
        speedup = f"{medians['bf16'] / medians[name]:.3f} x" if "bf16" in medians else ""
        report.row(
            name, f"{medians[name]:.1f}", f"{1e3 * min(values):.1f}, {1e3 * max(values):.1f}",
            f"{rate:,.0f}", f"{steps[name].peak_gb:.1f}", speedup,
        )  # fmt: skip
        report.summarize(f"step, {name}", f"{medians[name]:.1f} ms, {rate:,.0f} tokens/s {speedup}")


def profile_steps(report: Report) -> None:
    """The kernels of one step of bf16 and of fp8."""
    for name in ("bf16", "fp8"):
        with failing(report, f"profile, {name}"):
            profile(report, name, Steps(name))


def profile(report: Report, name: str, steps: Steps) -> None:
    steps.run(2)
    seconds = steps.run(STEPS_PER_REPEAT)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        steps.run(1)
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    report.heading(f"{name}: a kernel of a step", "ms", "calls", "us a call")
    lines = []
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for e in events:
        ms = e.self_device_time_total / 1e3
        cells = (f"{ms:.2f}", e.count, f"{1e3 * ms / e.count:.0f}")
        if len(lines) < TOP_KERNELS:
            report.row(e.key[:80].replace("|", "/"), *cells)
        lines.append(f"{cells[0]} ms, {cells[1]} x {cells[2]} us: {e.key}\n")
        kinds[kind_of(e.key)] += ms
    (report.folder / f"profile-{name}.txt").write_text("".join(lines), encoding="utf-8")
    report.heading(f"{name}: kernels", "ms")
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        report.row(kind, f"{ms:.1f}")
    report.row("all", f"{total:.1f}, of {1e3 * seconds:.1f} ms of a step")
    largest = ", ".join(f"{kind} {ms:.1f}" for kind, ms in kinds.items() if ms >= 1)
    report.summarize(f"kernels, {name}", f"{total:.1f} ms: {largest}")


def kind_of(kernel: str) -> str:
    lower = kernel.lower()
    for kind, parts in KINDS.items():
        if any(part in lower for part in parts):
            return kind
    return "other"


class Learning:
    """Trains GPT-2 small on the text."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self._tokens = from_name("gpt2", text).encode(text)
        self._cut = len(self._tokens) * 9 // 10

    def loader(self) -> DataLoader:
        return DataLoader(
            self._tokens[: self._cut], context_length=GPT2.block_size,
            global_batch_size=LOSS_SEQUENCES, seed=7, shuffle=True, device=DEVICE,
        )  # fmt: skip

    def train(self, dtype: str, seed: int, num_steps: int) -> tuple[TrainStep, list[float]]:
        trained, loader, found = build_step(dtype, seed=seed), self.loader(), []
        for number in range(num_steps):
            lr = 6e-4 * min(1, (number + 1) / 50)
            found.append(trained(*loader.next_batch(), lr=lr)[0])
        return trained, torch.stack(found).tolist()

    def val_loss(self, model: GPT) -> float:
        length = GPT2.block_size
        part = self._tokens[self._cut : self._cut + VAL_SEQUENCES * length + 1]
        val = torch.tensor(part.astype("int64"), device=DEVICE)
        x, y = val[:-1].view(-1, length), val[1:].view(-1, length)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            pairs = zip(x.split(8), y.split(8), strict=True)
            return sum(float(model(a, b)) for a, b in pairs) / y.numel()


def losses(report: Report, path: Path) -> None:
    learning = Learning(path)
    shown = [LOSS_STEPS * i // 8 for i in range(8)] + [LOSS_STEPS - 1]
    report.heading(
        "losses at step", *(str(step) for step in shown), "mean of last 50", "held out",
        "gradients not finite",
    )  # fmt: skip
    for dtype in ("bfloat16", "fp8"):
        for seed in (1, 2):
            with failing(report, f"losses, {dtype}"):
                trained, values = learning.train(dtype, seed, LOSS_STEPS)
                mean, val_loss = statistics.mean(values[-50:]), learning.val_loss(trained.model)
                cells = [f"{values[i]:.4f}" for i in shown]
                num_bad = sum(value != value for value in values)
                name = f"{dtype}, seed {seed}"
                report.row(name, *cells, f"{mean:.4f}", f"{val_loss:.4f}", num_bad)
                report.summarize(f"losses, {name}", f"{mean:.4f}, held out {val_loss:.4f}")


def rounding(report: Report, path: Path) -> None:
    """Relative error, share of elements that become zero, and that saturate, of each cast."""
    learning = Learning(path)
    trained, _ = learning.train("fp8", 1, 30)
    found: dict[str, list[Tensor]] = {}

    def measured(x: Tensor, out: Float8Tensor, *, gelu: bool = False) -> Float8Tensor:
        result = cast_transpose(x, out, gelu=gelu)
        value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
        back = out.data.float() * out.scale_inv
        is_zero = ((back == 0) & (value != 0)).float().mean()
        limit = torch.finfo(out.data.dtype).max
        is_max = (out.data.float().abs() == limit).float().mean()
        error = (back - value).norm() / value.norm()
        kind = "weight" if x.dtype == torch.float32 else "gelu" if gelu else str(tuple(x.shape))
        largest = value.abs().max() / out.scale_inv
        values = torch.stack([error, is_zero, is_max, largest])
        found.setdefault(f"{kind} {str(out.data.dtype)[6:]}", []).append(values)
        return result

    with patched(vars(backend), "cast_transpose", measured):
        trained(*learning.loader().next_batch(), lr=0.0)
    report.heading("cast", "largest relative error", "become 0", "saturate", "largest, scaled")
    for name, measurements in sorted(found.items()):
        worst = torch.stack(measurements).amax(0).tolist()
        report.row(name, f"{worst[0]:.4f}", f"{worst[1]:.4f}", f"{worst[2]:.1e}", f"{worst[3]:.3g}")


GROUPS = {
    "checks": ("casts", "matmuls", "model"),
    "step": ("steps", "profiles"),
    "kernels": ("matmul_times", "cast_times", "tiles"),
    "learning": ("losses", "rounding"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="for the losses")
    parser.add_argument("--out", type=Path, default=Path("fp8-results"), help="folder for tables")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups or parts, with commas")
    parser.add_argument("--append", action="store_true", help="keep the tables in the folder")
    args = parser.parse_args()
    parts: dict[str, Callable[[Report], None]] = {
        "casts": check_casts,
        "matmuls": check_matmuls,
        "model": check_model,
        "steps": time_steps,
        "profiles": profile_steps,
        "matmul_times": time_matmuls,
        "cast_times": time_casts,
        "tiles": time_tiles,
        "losses": lambda report: losses(report, args.text),
        "rounding": lambda report: rounding(report, args.text),
    }
    names = [name for item in args.only.split(",") for name in GROUPS.get(item, (item,))]
    if unknown := set(names) - parts.keys():
        parser.error(f"--only {args.only}: no part {', '.join(unknown)}")
    report = Report(args.out)
    if not args.append:
        for name in ("summary.md", "results.md"):
            (args.out / name).unlink(missing_ok=True)
        report.line(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.set_float32_matmul_precision("high")
    for i, name in enumerate(names):
        start = time.perf_counter()
        try:
            parts[name](report)
            torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            report.failure(name, error)
        report.line(f"\n{name}: {time.perf_counter() - start:.0f} s")
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:
            # After an illegal memory access, each call fails until the process ends.
            report.line("the GPU's context is lost: a new process runs the rest")
            if rest := names[i + 1 :]:
                options = ["--out", str(args.out), "--only", ",".join(rest), "--append"]
                command = [sys.executable, __file__, str(args.text), *options]
                os.execv(sys.executable, command)
    summary = report.summary_path
    rows = summary.read_text(encoding="utf-8") if summary.exists() else "| all checks | ok |\n"
    print(f"\n| part | result |\n| --- | --- |\n{rows}", flush=True)


if __name__ == "__main__":
    main()
