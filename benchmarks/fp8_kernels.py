"""Checks and times of the kernels for fp8, at GPT-2 small's shapes; run by fp8.py."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from kernel_choices import microseconds, time_interleaved
from torch import Tensor

from gptforge.config import GPTConfig
from gptforge.kernels import cublaslt, float8, float8_matmul, matmul
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.float8 import E4M3, E5M2, Float8Tensor, cast_transpose, empty_float8, one
from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.layer_norm import add_layer_norm
from gptforge.model import GPT
from gptforge.train.backends import float8 as backend
from gptforge.train.backends.cuda_graph import CudaGraphBackend
from gptforge.train.backends.manual import ManualBackend

GPT2 = GPTConfig(1024, 50304, 12, 12, 768)
N, C, V, CHUNK = 32768, 768, 50304, 8192
DEVICE = torch.device("cuda", 0)
MATMULS = (
    ("c_attn", 3 * C, C), ("attn.c_proj", C, C), ("c_fc", 4 * C, C), ("mlp.c_proj", C, 4 * C),
    ("head", V, C),
)  # fmt: skip
ROLES = ("forward", "dgrad", "wgrad")
TILES = ((128, 64, 8), (128, 64, 4), (64, 64, 4), (128, 128, 8), (64, 128, 8), (64, 128, 4))


class Report:
    """Prints, and appends to files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.summary_path = folder, folder / "summary.md"

    def line(self, text: str) -> None:
        print(text, flush=True)
        self._append(self.folder / "results.md", text)

    def heading(self, *cells: str) -> None:
        self.line("\n| " + " | ".join(cells) + " |\n|" + " --- |" * len(cells))

    def row(self, *cells: object) -> None:
        self.line("| " + " | ".join(str(cell) for cell in cells) + " |")

    def check(self, name: str, error: float, limit: float) -> None:
        is_right = error <= limit  # False for NaN
        self.row(name, f"{error:.2e}", f"{limit:.0e}", "ok" if is_right else "WRONG")
        if not is_right:
            self.summarize("WRONG", f"{name}: {error:.2e}, at most {limit:.0e}")

    def failure(self, name: str, error: BaseException) -> None:
        message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.row(name, "FAILED", message)
        self.summarize("FAILED", f"{name}: {message}")

    def summarize(self, *cells: str) -> None:
        """Add a row to the table that is printed last."""
        self._append(self.summary_path, "| " + " | ".join(cells) + " |")

    @staticmethod
    def _append(path: Path, text: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


@contextlib.contextmanager
def patched(target: dict, name: str, value: object) -> Iterator[None]:
    old = target[name]
    target[name] = value
    try:
        yield
    finally:
        target[name] = old


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def quantize(x: Tensor, dtype: torch.dtype = E4M3, scale_inv: float = 1.0) -> Float8Tensor:
    return cast_transpose(x, empty_float8(x, dtype, torch.tensor(scale_inv, device=DEVICE)))


def exact(x: Float8Tensor) -> Tensor:
    return x.data.double() * x.scale_inv.double()


def rel_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def share_different(a: Tensor, b: Tensor) -> float:
    """Share of bytes that differ."""
    return float((a.view(torch.uint8) != b.view(torch.uint8)).double().mean())


# Checks


def check_casts(report: Report) -> None:
    report.heading("check", "error", "limit", "")
    x = randn(1000, C) * 3
    x[0, :4] = torch.tensor([torch.nan, 1e9, -1e9, 1e-9])
    scale = torch.tensor(0.013, device=DEVICE)
    for dtype in (E4M3, E5M2):
        for gelu in (False, True):
            out = cast_transpose(x, empty_float8(x, dtype, scale), gelu=gelu)
            value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
            expected = float8._write_torch(value, empty_float8(x, dtype, scale))
            name = f"cast to {str(dtype)[6:]}{', gelu' if gelu else ''}"
            report.check(
                f"{name}: bytes that differ", share_different(out.data, expected.data), 0.01
            )
            report.check(f"{name}: NaN lost", float(not out.data[0, 0].float().isnan()), 0)
            report.check(f"{name}: transpose", share_different(out.transpose.t(), out.data), 0)
    again = float8.transpose(out.data)
    report.check("transpose of fp8", share_different(again, out.transpose), 0)
    x, dy = randn(1000, 4 * C), randn(1000, 4 * C)
    out, bias_grad = empty_float8(x, E5M2, scale), torch.zeros(4 * C, device=DEVICE)
    float8.gelu_backward_cast_transpose(x, dy, out, bias_grad)
    grad = torch.ops.aten.gelu_backward(dy.double(), x.double(), approximate="tanh")
    report.check("gelu backward", rel_error(exact(out), grad), 6e-2)
    report.check("gelu backward: bias gradient", rel_error(bias_grad, grad.sum(0)), 1e-4)
    report.check("gelu backward: transpose", share_different(out.transpose.t(), out.data), 0)
    residual, weight = randn(1000, C), torch.randn(C, device=DEVICE)
    plain, _ = add_layer_norm(residual, None, weight, weight)
    fp8, _ = add_layer_norm(residual, None, weight, weight, None, E4M3)
    report.check("layer norm", rel_error(fp8, plain), 4e-2)
    logits, targets = randn(512, V), torch.randint(V, (512,), device=DEVICE)
    grad_fp8 = torch.empty_like(logits, dtype=E5M2)
    losses = cross_entropy_in_place(logits, targets, -1, 2.0**15, grad_fp8)
    same = cross_entropy_in_place(logits, targets, -1, 2.0**15)
    report.check("cross-entropy: losses", rel_error(losses, same), 0)
    report.check("cross-entropy: gradient", rel_error(grad_fp8, logits), 7e-2)


class Matmuls:
    """The three matmuls of a layer: their operands, and what computes them."""

    def __init__(self, rows: int, out: int, inner: int) -> None:
        self.x, self.dy = randn(rows, inner), randn(rows, out) * 1e-6
        self.weight, self.bias = randn(out, inner) * 0.02, randn(out)
        self.x8, self.dy8 = quantize(self.x), quantize(self.dy, E5M2, 2.0**-20)
        self.w8 = quantize(self.weight, E4M3, 2.0**-10)
        self.weight_grad = torch.zeros(out, inner, device=DEVICE)

    def operands(self, role: str) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], torch.dtype]:
        """left and right of left @ right.T in fp8, their scales, and the dtype of the output."""
        x, dy, w, scale = self.x8, self.dy8, self.w8, one(DEVICE)
        return {
            "forward": (x.data, w.data, (scale, w.scale_inv), torch.bfloat16),
            "dgrad": (dy.data, w.transpose, (dy.scale_inv, w.scale_inv), torch.bfloat16),
            "wgrad": (dy.transpose, x.transpose, (dy.scale_inv, scale), torch.float32),
        }[role]

    def bf16(self, role: str) -> Tensor | None:
        return {
            "forward": lambda: matmul.linear(self.x, self.weight, self.bias),
            "dgrad": lambda: matmul.linear_dgrad(self.dy, self.weight),
            "wgrad": lambda: matmul.accumulate_wgrad(self.weight_grad, self.dy, self.x),
        }[role]()

    def fp8(self, role: str, *, fast: bool) -> Tensor:
        with patched(float8_matmul.FAST_ACCUM, role, fast):
            if role == "forward":
                return float8_matmul.float8_linear(self.x8.data, self.w8, self.bias)
            if role == "dgrad":
                return float8_matmul.float8_dgrad(self.dy8, self.w8)
            float8_matmul.accumulate_float8_wgrad(self.weight_grad, self.dy8, self.x8.transpose)
            return self.weight_grad

    def by_torch(self, role: str, *, fast: bool) -> Tensor:
        left, right, scales, dtype = self.operands(role)
        bias = self.bias if role == "forward" else None
        return torch._scaled_mm(
            left, right.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=fast
        )

    def reference(self, role: str) -> Tensor:
        x, dy, w = exact(self.x8), exact(self.dy8), exact(self.w8)
        if role == "forward":
            return x @ w.t() + self.bias.double()
        return dy @ w if role == "dgrad" else dy.t() @ x

    def make_plan(self, role: str, *, fast: bool) -> cublaslt.MatmulPlan:
        """The plan that `fp8` uses; raises the error that `find_plan` hides."""
        left, right, _, dtype = self.operands(role)
        epilogue = cublaslt.Epilogue.BIAS if role == "forward" else cublaslt.Epilogue.DEFAULT
        return cublaslt.MatmulPlan(
            DEVICE, left.shape, right.shape, (left.dtype, right.dtype), (False, True), epilogue,
            accumulate=dtype == torch.float32, fast_accum=fast,
        )  # fmt: skip


def check_matmuls(report: Report) -> None:
    """Each variant alone, so that one that fails is named, and keeps no other from running."""
    report.heading("matmul", "error", "limit", "")
    for name, out, inner in MATMULS:
        operands = Matmuls(4096, out, inner)
        for role in ROLES:
            expected = operands.reference(role)
            for fast in (True, False):
                label = f"{name} {role}, {'fast' if fast else 'full'} accumulation"
                with failing(report, f"{label}: cuBLASLt plan"):
                    operands.make_plan(role, fast=fast)
                for kind, work in (("", operands.fp8), (", by torch", operands.by_torch)):
                    with failing(report, label + kind):
                        operands.weight_grad.zero_()
                        work(role, fast=fast)  # autotunes
                        operands.weight_grad.zero_()
                        error = rel_error(work(role, fast=fast), expected)
                        report.check(label + kind, error, 2e-2 if fast else 5e-3)


def check_model(report: Report) -> None:
    """Gradients of a model of two layers, and of the same step in a CUDA graph."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(256, V, 2, C // 64, C)).init_weights().to(DEVICE)
    idx = torch.randint(V, (16, 256), device=DEVICE)
    grads, losses = {}, {}
    for kind in (ManualBackend, backend.Float8Backend):
        trained = kind(model, torch.bfloat16)
        trained.zero_grad()
        loss = trained.forward_backward(idx, idx.roll(-1, 1), 1 / idx.numel())
        losses[kind] = float(loss) / idx.numel()
        grads[kind] = {name: p.grad.clone() for name, p in model.named_parameters()}
    (plain, fp8), (loss, loss_fp8) = grads.values(), losses.values()
    errors = {name: rel_error(fp8[name], plain[name]) for name in plain}
    worst = max(errors, key=lambda name: errors[name])
    report.heading("model", "error", "limit", "")
    report.check(f"loss, {loss:.4f} in bf16", abs(loss_fp8 - loss), 0.02)
    report.check(f"gradients, largest difference: {worst}", errors[worst], 0.3)
    report.check("gradients, median difference", statistics.median(errors.values()), 0.1)
    graph = CudaGraphBackend(trained, assign_grads=True)
    for scale in (0.1, 0.3, 1 / idx.numel()):
        graph.zero_grad()
        graph.forward_backward(idx, idx.roll(-1, 1), scale)
    replayed = {name: rel_error(p.grad, fp8[name]) for name, p in model.named_parameters()}
    report.check("gradients by a CUDA graph", max(replayed.values()), 1e-2)


@contextlib.contextmanager
def failing(report: Report, name: str) -> Iterator[None]:
    """Report an error and continue, unless the GPU's context is lost."""
    try:
        yield
    except Exception as error:
        report.failure(name, error)
        torch.cuda.synchronize()


# Times


def time_matmuls(report: Report) -> None:
    report.heading(
        "matmul, us", "bf16", "fp8, fast", "fp8, full", "by torch, fast", "by torch, full",
        "speedup, TFLOP/s",
    )  # fmt: skip
    bf16_total, best_total = 0.0, 0.0
    for name, out, inner in MATMULS:
        rows = CHUNK if name == "head" else N
        operands = Matmuls(rows, out, inner)
        for role in ROLES:
            works: list[Callable[[], object]] = [lambda r=role, o=operands: o.bf16(r)]
            for kind in (operands.fp8, operands.by_torch):
                works += [lambda k=kind, r=role, f=f: k(r, fast=f) for f in (True, False)]
            times = []
            for work in works:
                times.append(float("nan"))
                with failing(report, f"{name} {role}: variant {len(times)}"):
                    times[-1] = min(microseconds(work) for _ in range(2))
            best = min((t for t in times[1:3] if t == t), default=float("nan"))
            rate = 2.0 * rows * out * inner / best / 1e6
            note = f"{times[0] / best:.2f} x, {rate:.0f}"
            report.row(f"{name} {role}", *(f"{t:.0f}" for t in times), note)
            calls = 16 if name == "head" else 48  # in a step of four micro-batches
            bf16_total, best_total = bf16_total + calls * times[0], best_total + calls * best
    report.summarize(
        "matmuls of a step",
        f"bf16 {bf16_total / 1e3:.1f} ms, fp8 (the faster accumulation) {best_total / 1e3:.1f} ms",
    )


def time_casts(report: Report) -> None:
    report.heading("operation, us", "bf16", "fp8", "")
    residual, x, weight = randn(N, C), randn(N, C), torch.ones(C, device=DEVICE)
    pre_act, grad, bias_grad = randn(N, 4 * C), randn(N, 4 * C), torch.zeros(4 * C, device=DEVICE)
    out = empty_float8(pre_act, E5M2, one(DEVICE))
    w, b, h = randn(4 * C, C), randn(4 * C), randn(N, C)
    h8, w8 = quantize(h), quantize(w)
    gelu_out = empty_float8(pre_act, E4M3, one(DEVICE))
    logits, targets = randn(CHUNK, V), torch.randint(V, (CHUNK,), device=DEVICE)
    data = torch.empty_like(logits, dtype=E5M2)
    model = GPT(GPT2).init_weights().to(DEVICE)
    plain = ManualBackend(model, torch.bfloat16)
    fp8 = backend.Float8Backend(model, torch.bfloat16)
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "layer norm, forward": (
            lambda: add_layer_norm(residual, x, weight, weight),
            lambda: add_layer_norm(residual, x, weight, weight, None, E4M3),
        ),
        "gelu, backward": (
            lambda: gelu_backward(pre_act, grad, bias_grad, recompute=False),
            lambda: float8.gelu_backward_cast_transpose(pre_act, grad, out, bias_grad),
        ),
        "c_fc and gelu, forward (fp8: a matmul, then the cast)": (
            lambda: matmul.linear_gelu(h, w, b),
            lambda: cast_transpose(
                float8_matmul.float8_linear(h8.data, w8, b), gelu_out, gelu=True
            ),
        ),
        "cross-entropy of 8192 tokens": (
            lambda: cross_entropy_in_place(logits, targets, -1, 1.0),
            lambda: cross_entropy_in_place(logits, targets, -1, 1.0, data),
        ),
        "zeroing gradients and copying weights, once a step": (plain.zero_grad, fp8.zero_grad),
    }
    for name, (bf16_work, fp8_work) in pairs.items():
        with failing(report, name):
            report.row(name, *(f"{t:.0f}" for t in time_interleaved(bf16_work, fp8_work)), "")


def time_tiles(report: Report) -> None:
    x, qkv, pre_act, grad = randn(N, C), randn(N, 3 * C), randn(N, 4 * C), randn(N, 4 * C)
    logits8 = torch.randint(0, 100, (CHUNK, V), device=DEVICE, dtype=torch.uint8).view(E5M2)
    x8, bias_grad = quantize(x).data, torch.zeros(4 * C, device=DEVICE)
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
    report.heading("rows x columns, warps: us, TB/s", *works)
    for tile in TILES:
        cells = []
        with contextlib.ExitStack() as stack:
            for name, value in zip(("ROWS", "COLUMNS", "NUM_WARPS"), tile, strict=True):
                stack.enter_context(patched(vars(float8), name, value))
            for name, (work, nbytes) in works.items():
                cells.append("failed")
                with failing(report, f"{name}, tile {tile}"):
                    us = min(microseconds(work) for _ in range(2))
                    cells[-1] = f"{us:.0f}, {nbytes / us / 1e6:.1f}"
        report.row(f"{tile[0]} x {tile[1]}, {tile[2]}", *cells)
