"""fp8 training on a GPU: is it right, how fast is each part, does it learn the same?

    python benchmarks/fp8.py input.txt

Four sections, each of which runs even if another one fails; --only runs some of them:

- checks: kernels and matmuls against torch in float64, and the gradients of a model.
- kernels: microseconds of matmuls and casts at GPT-2 small's shapes (a micro-batch of 32 sequences
  of 1024), fp8 beside bfloat16, and the casts with other tiles.
- step: GPT-2 small, 131,072 tokens a step, bfloat16 beside fp8 and its variants, interleaved; then
  the kernels of a step.
- losses: GPT-2 small on the text, 32 sequences a step, two seeds of each; then the rounding errors
  of the casts.
"""

import argparse
import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from kernel_choices import microseconds, time_interleaved
from torch import Tensor

from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.device import select_precision
from gptforge.kernel_select import select_kernels
from gptforge.kernels import float8, float8_matmul, matmul
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.float8 import E4M3, E5M2, Float8Tensor, cast_transpose, empty_float8, one
from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.layer_norm import add_layer_norm
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.tokenizers import from_name
from gptforge.train.backends import factory
from gptforge.train.backends import float8 as backend
from gptforge.train.backends.manual import ManualBackend
from gptforge.train.backends.manual_layers import ManualHead
from gptforge.train.train_step import TrainStep

GPT2 = GPTConfig(1024, 50304, 12, 12, 768)
N, C, V, CHUNK = 32768, 768, 50304, 8192
SEQUENCES, LOSS_SEQUENCES, LOSS_STEPS, REPEATS = 128, 32, 200, 4
DEVICE = torch.device("cuda")
LAYERS = (("c_attn", 3 * C, C), ("attn.c_proj", C, C), ("c_fc", 4 * C, C), ("mlp.c_proj", C, 4 * C))
TILES = ((128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (64, 128, 8), (64, 128, 4))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def quantize(x: Tensor, dtype: torch.dtype = E4M3, scale_inv: float = 1.0) -> Float8Tensor:
    return cast_transpose(x, empty_float8(x, dtype, torch.tensor(scale_inv, device=DEVICE)))


def exact(x: Float8Tensor) -> Tensor:
    return x.data.double() * x.scale_inv.double()


def rel_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


# Checks


def report(name: str, value: float, limit: float) -> None:
    verdict = "ok" if value <= limit else "WRONG"
    print(f"| {name} | {value:.2e} | {limit:.0e} | {verdict} |", flush=True)


def checks() -> None:
    print("\n| check | error | limit | |\n| --- | --- | --- | --- |")
    for section in (check_casts, check_matmuls, check_model):
        attempt(section)


def check_casts() -> None:
    x = randn(1000, C) * 3
    x[0, :4] = torch.tensor([torch.nan, 1e9, -1e9, 1e-9])
    scale = torch.tensor(0.013, device=DEVICE)
    for dtype in (E4M3, E5M2):
        for gelu in (False, True):
            out = cast_transpose(x, empty_float8(x, dtype, scale), gelu=gelu)
            value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
            expected = float8._write_torch(value, empty_float8(x, dtype, scale))
            name = f"{dtype}, gelu {gelu}"
            equal = out.data.view(torch.uint8) == expected.data.view(torch.uint8)
            report(f"cast to {name}: share that differs", 1 - float(equal.double().mean()), 1e-2)
            report(f"{name}: NaN kept", float(not out.data[0, 0].float().isnan()), 0)
            different = out.transpose.t().view(torch.uint8) != out.data.view(torch.uint8)
            report(f"{name}: transpose", float(different.any()), 0)
    different = float8.transpose(out.data).view(torch.uint8) != out.transpose.view(torch.uint8)
    report("fp8 transpose", float(different.any()), 0)
    x, dy = randn(1000, 4 * C), randn(1000, 4 * C)
    out = empty_float8(x, E5M2, scale)
    bias_grad = torch.zeros(4 * C, device=DEVICE)
    float8.gelu_backward_cast_transpose(x, dy, out, bias_grad)
    grad = torch.ops.aten.gelu_backward(dy.double(), x.double(), approximate="tanh")
    report("gelu backward, bias gradient", rel_error(bias_grad, grad.sum(0)), 1e-4)
    report("gelu backward", rel_error(exact(out), grad), 6e-2)
    different = out.transpose.t().view(torch.uint8) != out.data.view(torch.uint8)
    report("gelu backward, transpose", float(different.any()), 0)
    residual, weight = randn(1000, C), torch.randn(C, device=DEVICE)
    plain, _ = add_layer_norm(residual, None, weight, weight)
    fp8, _ = add_layer_norm(residual, None, weight, weight, None, E4M3)
    report("layer norm", rel_error(fp8, plain), 4e-2)
    logits, targets = randn(512, V), torch.randint(V, (512,), device=DEVICE)
    out8 = torch.empty_like(logits, dtype=E5M2)
    losses = cross_entropy_in_place(logits, targets, -1, 2.0**15, out8)
    same = cross_entropy_in_place(logits, targets, -1, 2.0**15)
    report("cross-entropy, losses", rel_error(losses, same), 0)
    report("cross-entropy, gradient", rel_error(out8, logits), 7e-2)


def check_matmuls() -> None:
    for name, out, inner in (*LAYERS, ("head", V, C)):
        rows = 4096
        x, dy = quantize(randn(rows, inner)), quantize(randn(rows, out) * 1e-6, E5M2, 2.0**-20)
        weight = quantize(randn(out, inner) * 0.02, E4M3, 2.0**-10)
        bias = randn(out)
        y = exact(x) @ exact(weight).t() + bias.double()
        y8 = float8_matmul.float8_linear(x.data, weight, bias)
        report(f"{name} forward", rel_error(y8, y), 1e-2)
        dx = exact(dy) @ exact(weight)
        report(f"{name} dgrad", rel_error(float8_matmul.float8_dgrad(dy, weight), dx), 1e-2)
        weight_grad = torch.randn(out, inner, device=DEVICE) * 1e-4
        dw = weight_grad.double() + 2 * exact(dy).t() @ exact(x)
        for _ in range(2):
            float8_matmul.accumulate_float8_wgrad(weight_grad, dy, x.transpose)
        report(f"{name} wgrad", rel_error(weight_grad, dw), 1e-2)
        plan = matmul.find_plan(x.data, weight.data, transpose=(False, True), fast_accum=True)
        report(f"{name}: cuBLASLt has no plan", float(plan is None), 0)


def check_model() -> None:
    shape = GPTConfig(256, V, 2, 12, C)
    torch.manual_seed(1)
    model = GPT(shape).init_weights().to(DEVICE)
    idx = torch.randint(V, (16, 256), device=DEVICE)
    grads = {}
    for kind in (ManualBackend, backend.Float8Backend):
        one_of = kind(model, torch.bfloat16)
        one_of.zero_grad()
        loss = one_of.forward_backward(idx, idx.roll(-1, 1), 1 / idx.numel())
        print(f"| loss, {kind.__name__} | {float(loss) / idx.numel():.4f} | | |")
        grads[kind] = {name: p.grad.clone() for name, p in model.named_parameters()}
    plain, fp8 = grads.values()
    errors = {name: rel_error(fp8[name], plain[name]) for name in plain}
    worst = max(errors, key=lambda name: errors[name])
    report(f"gradients, largest difference: {worst}", errors[worst], 0.3)
    report("gradients, median difference", statistics.median(errors.values()), 0.1)


# Kernels


def kernels() -> None:
    for section in (time_matmuls, time_casts, time_tiles):
        attempt(section)


def row(name: str, *times: float, note: str = "") -> None:
    print(f"| {name} | {' | '.join(f'{t:.0f}' for t in times)} | {note} |", flush=True)


def time_matmuls() -> None:
    print("\n| matmul | bf16, us | fp8, fast | fp8, full | fp8 by torch, fast | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, out, inner, rows in (*((*layer, N) for layer in LAYERS), ("head", V, C, CHUNK)):
        x, dy, weight = randn(rows, inner), randn(rows, out), randn(out, inner)
        x8, dy8, w8 = quantize(x), quantize(dy, E5M2), quantize(weight)
        bias = randn(out)
        weight_grad = torch.zeros(out, inner, device=DEVICE)
        flops = 2.0 * rows * out * inner

        def by_torch(left: Tensor, right: Tensor, dtype: torch.dtype) -> Callable[[], object]:
            return lambda: torch._scaled_mm(
                left, right.t(), one(DEVICE), one(DEVICE), out_dtype=dtype, use_fast_accum=True
            )

        works = {
            "forward": (
                lambda x=x, w=weight, b=bias: matmul.linear(x, w, b),
                lambda x=x8, w=w8, b=bias: float8_matmul.float8_linear(x.data, w, b),
                by_torch(x8.data, w8.data, torch.bfloat16),
            ),
            "dgrad": (
                lambda g=dy, w=weight: matmul.linear_dgrad(g, w),
                lambda g=dy8, w=w8: float8_matmul.float8_dgrad(g, w),
                by_torch(dy8.data, w8.transpose, torch.bfloat16),
            ),
            "wgrad": (
                lambda wg=weight_grad, g=dy, x=x: matmul.accumulate_wgrad(wg, g, x),
                lambda wg=weight_grad, g=dy8, x=x8: float8_matmul.accumulate_float8_wgrad(
                    wg, g, x.transpose
                ),
                by_torch(dy8.transpose, x8.transpose, torch.float32),
            ),
        }
        for role, (bf16, fp8, torchs) in works.items():
            times = {}
            for fast in (True, False):
                with patched(float8_matmul.FAST_ACCUM, role, fast):
                    times[fast] = time_interleaved(bf16, fp8)
            try:
                torch_time = microseconds(torchs)
            except RuntimeError:
                torch_time = float("nan")
            best = min(times[True][1], times[False][1])
            note = f"{times[True][0] / best:.2f} x, {flops / best / 1e6:.0f} TFLOP/s"
            row(f"{name} {role}", *times[True], times[False][1], torch_time, note=note)


def time_casts() -> None:
    print("\n| operation | bf16, us | fp8 | |\n| --- | --- | --- | --- |")
    residual, x = randn(N, C), randn(N, C)
    weight = torch.ones(C, device=DEVICE)
    times = time_interleaved(
        lambda: add_layer_norm(residual, x, weight, weight),
        lambda: add_layer_norm(residual, x, weight, weight, None, E4M3),
    )
    row("layer norm, forward", *times)
    pre_act, grad, bias_grad = randn(N, 4 * C), randn(N, 4 * C), torch.zeros(4 * C, device=DEVICE)
    out = empty_float8(pre_act, E5M2, one(DEVICE))
    times = time_interleaved(
        lambda: gelu_backward(pre_act, grad, bias_grad, recompute=False),
        lambda: float8.gelu_backward_cast_transpose(pre_act, grad, out, bias_grad),
    )
    row("gelu, backward", *times)
    w, b, h = randn(4 * C, C), randn(4 * C), randn(N, C)
    h8, w8 = quantize(h), quantize(w)
    gelu_out = empty_float8(pre_act, E4M3, one(DEVICE))
    times = time_interleaved(
        lambda: matmul.linear_gelu(h, w, b),
        lambda: cast_transpose(float8_matmul.float8_linear(h8.data, w8, b), gelu_out, gelu=True),
    )
    row("c_fc and gelu, forward", *times, note="fp8: a matmul, then the cast")
    logits, targets = randn(CHUNK, V), torch.randint(V, (CHUNK,), device=DEVICE)
    data = torch.empty_like(logits, dtype=E5M2)
    times = time_interleaved(
        lambda: cross_entropy_in_place(logits.clone(), targets, -1, 1.0),
        lambda: (logits.clone(), cross_entropy_in_place(logits, targets, -1, 1.0, data)),
        lambda: logits.clone(),
    )
    row("cross-entropy", times[0] - times[2], times[1] - times[2])
    model = GPT(GPT2).init_weights().to(DEVICE)
    weights = backend.Float8Backend(model, torch.bfloat16)._weights
    plain = ManualBackend(model, torch.bfloat16)._weights
    with torch.no_grad():
        row("all weights, once a step", *time_interleaved(plain.refresh, weights.refresh))


def time_tiles() -> None:
    x, qkv, pre_act, grad = randn(N, C), randn(N, 3 * C), randn(N, 4 * C), randn(N, 4 * C)
    logits8 = torch.randint(0, 100, (CHUNK, V), device=DEVICE, dtype=torch.uint8).view(E5M2)
    x8 = quantize(x).data
    bias_grad = torch.zeros(4 * C, device=DEVICE)
    outs = {t.size(1): empty_float8(t, E5M2, one(DEVICE)) for t in (x, qkv, pre_act)}
    gelu_out = empty_float8(pre_act, E4M3, one(DEVICE))
    works: dict[str, tuple[Callable[[], object], int]] = {
        "cast_transpose C": (lambda: cast_transpose(x, outs[C]), 4 * x.numel()),
        "cast_transpose 3C": (lambda: cast_transpose(qkv, outs[3 * C]), 4 * qkv.numel()),
        "gelu 4C": (lambda: cast_transpose(pre_act, gelu_out, gelu=True), 4 * pre_act.numel()),
        "gelu backward 4C": (
            lambda: float8.gelu_backward_cast_transpose(pre_act, grad, outs[4 * C], bias_grad),
            6 * pre_act.numel(),
        ),
        "transpose C": (lambda: float8.transpose(x8), 2 * x8.numel()),
        "transpose logits": (lambda: float8.transpose(logits8), 2 * logits8.numel()),
    }
    print("\n| rows x columns, warps |", " | ".join(works), "|")
    print("| --- |", " --- |" * len(works))
    for tile in TILES:
        with contextlib.ExitStack() as stack:
            for name, value in zip(("ROWS", "COLUMNS", "NUM_WARPS"), tile, strict=True):
                stack.enter_context(patched(vars(float8), name, value))
            cells = []
            for work, size in works.values():
                try:
                    us = min(microseconds(work) for _ in range(2))
                    cells.append(f"{us:.0f} us, {size / us / 1e6:.1f} TB/s")
                except Exception as error:  # a tile may be too large
                    cells.append(type(error).__name__)
        print(f"| {tile[0]} x {tile[1]}, {tile[2]} |", " | ".join(cells), "|", flush=True)


# Steps and losses


class Bf16HeadBackend(backend.Float8Backend):
    """The output layer in bfloat16."""

    head_class = ManualHead

    def __init__(self, model: GPT, dtype: torch.dtype, **options: object) -> None:
        super().__init__(model, dtype, **options)
        self._ln_f.out_dtype = dtype


def build_step(dtype: str, *, seed: int = 1, micro_batch: int = 32) -> TrainStep:
    torch.manual_seed(seed)
    precision = select_precision(dtype, DEVICE)
    model = GPT(GPT2).init_weights(torch.Generator().manual_seed(seed)).to(DEVICE)
    return TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        precision=precision,
        micro_batch_size=micro_batch,
        grad_clip=1.0,
        kernels=select_kernels(Config(), DEVICE, precision),
    )


def build_bf16_head() -> TrainStep:
    with patched(vars(factory), "Float8Backend", Bf16HeadBackend):
        return build_step("fp8")


def step() -> None:
    tokens = torch.randint(V, (SEQUENCES, 1025), device=DEVICE)
    x, y = tokens[:, :-1], tokens[:, 1:]
    builders: dict[str, Callable[[], TrainStep]] = {
        "bf16": lambda: build_step("bfloat16"),
        "fp8": lambda: build_step("fp8"),
        "fp8, head in bf16": build_bf16_head,
        "fp8, fast accumulation in dgrad": lambda: build_step("fp8"),
        "fp8, fast accumulation throughout": lambda: build_step("fp8"),
    }
    fast_roles = {"fp8, fast accumulation in dgrad": ("dgrad",)}
    fast_roles["fp8, fast accumulation throughout"] = ("dgrad", "wgrad")
    steps: dict[str, TrainStep] = {}
    memory: dict[str, float] = {}

    def run(name: str, count: int) -> float:
        with contextlib.ExitStack() as stack:
            for role in fast_roles.get(name, ()):
                stack.enter_context(patched(float8_matmul.FAST_ACCUM, role, True))
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                steps[name](x, y, lr=1e-4)
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / count

    for name, build in builders.items():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            steps[name] = build()
            run(name, 3)
        except Exception:
            steps.pop(name, None)
            traceback.print_exc()
            continue
        memory[name] = (torch.cuda.max_memory_allocated() - held) / 1e9
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name in steps:
            seconds[name].append(run(name, 5))
    print("\n| step | ms | lowest, highest | tokens/s | peak GB |\n| --- | --- | --- | --- | --- |")
    for name, values in seconds.items():
        median, low, high = (1e3 * f(values) for f in (statistics.median, min, max))
        rate = x.numel() / median * 1e3
        print(
            f"| {name} | {median:.1f} | {low:.1f}, {high:.1f} | {rate:,.0f} | {memory[name]:.1f} |"
        )
    for name in ("bf16", "fp8"):
        if name in steps:
            print_profile(name, lambda name=name: run(name, 1))


def print_profile(name: str, work: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
    events = [e for e in profiler.key_averages() if str(e.device_type).endswith("CUDA")]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e3
    print(f"\n{name}: {total:.1f} ms of kernels\n\n| kernel | ms | calls |\n| --- | --- | --- |")
    for e in events[:24]:
        print(f"| {e.key[:90]} | {e.self_device_time_total / 1e3:.2f} | {e.count} |")


def losses(text: str) -> None:
    tokens = from_name("gpt2", text).encode(text)
    cut = len(tokens) * 9 // 10
    val = torch.tensor(tokens[cut : cut + 32 * 1024 + 1].astype("int64"), device=DEVICE)
    shown = (0, 10, 25, 50, 75, 100, 125, 150, 175, LOSS_STEPS - 1)
    print(
        "\n| losses at step |", " | ".join(str(s) for s in shown), "| mean of last 50 | held out |"
    )
    print("| --- |", " --- |" * (len(shown) + 2))
    for dtype in ("bfloat16", "fp8"):
        for seed in (1, 2):
            trained = build_step(dtype, seed=seed)
            loader = DataLoader(
                tokens[:cut], context_length=1024, global_batch_size=LOSS_SEQUENCES, seed=7,
                shuffle=True, device=DEVICE,
            )  # fmt: skip
            found = []
            for number in range(LOSS_STEPS):
                lr = 6e-4 * min(1, (number + 1) / 50)
                found.append(trained(*loader.next_batch(), lr=lr)[0])
            values = [float(loss) for loss in found]
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                pairs = zip(val[:-1].view(4, 8, 1024), val[1:].view(4, 8, 1024), strict=True)
                val_loss = sum(float(trained.model(a, b)) for a, b in pairs) / (32 * 1024)
            cells = " | ".join(f"{values[s]:.4f}" for s in shown)
            mean = statistics.mean(values[-50:])
            print(f"| {dtype}, seed {seed} | {cells} | {mean:.4f} | {val_loss:.4f} |", flush=True)
    attempt(lambda: rounding_errors(trained, loader))


def rounding_errors(trained: TrainStep, loader: DataLoader) -> None:
    """Relative error, share of elements that become zero, and that saturate, of each cast."""
    found: list[tuple[str, Tensor]] = []

    def measured(x: Tensor, out: Float8Tensor, *, gelu: bool = False) -> Float8Tensor:
        result = cast_transpose(x, out, gelu=gelu)
        value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
        back = out.data.float() * out.scale_inv
        is_zero = ((back == 0) & (value != 0)).float().mean()
        limit = torch.finfo(out.data.dtype).max
        is_max = (out.data.float().abs() == limit).float().mean()
        error = (back - value).norm() / value.norm()
        kind = "weight" if x.dtype == torch.float32 else "gelu" if gelu else str(tuple(x.shape))
        name = f"{kind} {str(out.data.dtype)[6:]}"
        found.append(
            (name, torch.stack([error, is_zero, is_max, value.abs().max() / out.scale_inv]))
        )
        return result

    with patched(vars(backend), "cast_transpose", measured):
        trained(*loader.next_batch(), lr=0.0)
    print("\n| cast | largest relative error | become 0 | saturate | largest, scaled |")
    print("| --- | --- | --- | --- | --- |")
    for name in sorted({name for name, _ in found}):
        worst = torch.stack([values for other, values in found if other == name]).amax(0).tolist()
        print(f"| {name} | {worst[0]:.4f} | {worst[1]:.4f} | {worst[2]:.1e} | {worst[3]:.3g} |")


@contextlib.contextmanager
def patched(target: dict[str, object], name: str, value: object) -> Iterator[None]:
    old = target[name]
    target[name] = value
    try:
        yield
    finally:
        target[name] = old


def attempt(section: Callable[[], None]) -> None:
    try:
        section()
    except Exception:
        print(f"FAILED: {section}")
        traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--only", default="checks,kernels,step,losses")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    text = args.text.read_text(encoding="utf-8")
    sections: dict[str, Callable[[], None]] = {
        "checks": checks,
        "kernels": kernels,
        "step": step,
        "losses": lambda: losses(text),
    }
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in args.only.split(","):
        start = time.perf_counter()
        attempt(sections[name])
        torch.cuda.empty_cache()
        print(f"\n{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
