"""GPU time of the operations of a training step at GPT-2 small's shapes, beside torch's.

    python benchmarks/kernel_choices.py

One micro-batch of 32 sequences of 1024 on a CUDA GPU: matmuls by torch and by cuBLASLt with its
heuristics timed, alone and with their epilogues; the memory-bound kernels, with and without
dropout; attention. Medians of CUDA events in microseconds, queued while the GPU waits, so that
Python's time does not count. Every pair is timed twice, interleaved.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels import (
    embedding,
    gelu,
    layer_norm,
    matmul,
)
from gptforge.kernels.attention import SdpaAttention, TritonAttention
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.dropout import DropoutRate
from gptforge.kernels.reductions import accumulate_column_sums

N, C, V = 32768, 768, 50304
ROUNDS, WARMUP = 15, 3
WAIT_CYCLES = 20_000_000  # the GPU waits until Python has queued all rounds
DROPOUT = 0.2
Work = Callable[[], object]


def microseconds(work: Work) -> float:
    for _ in range(WARMUP):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    torch.cuda._sleep(WAIT_CYCLES)
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(end) for start, end in events)[ROUNDS // 2]


def time_interleaved(*works: Work) -> list[float]:
    """The lower of two medians of each."""
    repeats = [[microseconds(work) for work in works] for _ in range(2)]
    return [min(times) for times in zip(*repeats, strict=True)]


def print_row(label: str, baseline: float, chosen: float, *, flops: float = 0.0) -> None:
    rate = f"{flops / chosen / 1e6:.0f}" if flops else ""
    saved = baseline - chosen
    print(f"| {label} | {baseline:.0f} | {chosen:.0f} | {saved:+.0f} | {rate} |", flush=True)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16() * shape[-1] ** -0.5


def linear_layers() -> None:
    for name, out, inner in (("c_attn", 3 * C, C), ("attn.c_proj", C, C), ("c_fc", 4 * C, C),
                             ("mlp.c_proj", C, 4 * C)):  # fmt: skip
        x, weight, bias, grad = randn(N, inner), randn(out, inner), randn(out), randn(N, out)
        flops = 2.0 * N * out * inner
        forward = time_interleaved(
            lambda x=x, w=weight, b=bias: torch.addmm(b, x, w.t()),
            lambda x=x, w=weight, b=bias: matmul.linear(x, w, b),
        )
        print_row(f"{name}, forward with bias", *forward, flops=flops)
        dgrad = time_interleaved(
            lambda g=grad, w=weight: g @ w,
            lambda g=grad, w=weight: matmul.linear_dgrad(g, w),
        )
        print_row(f"{name}, dgrad", *dgrad, flops=flops)
        weight_grad = torch.zeros(out, inner, device="cuda")
        wgrad = time_interleaved(
            lambda wg=weight_grad, g=grad, x=x: torch.addmm(
                wg, g.t(), x, out_dtype=torch.float32, out=wg
            ),
            lambda wg=weight_grad, g=grad, x=x: matmul.accumulate_wgrad(wg, g, x),
        )
        print_row(f"{name}, wgrad, accumulated in fp32", *wgrad, flops=flops)


def mlp_epilogues() -> None:
    x, weight, bias = randn(N, C), randn(4 * C, C), randn(4 * C)
    print_row(
        "c_fc with bias, then GELU; GELU in the epilogue",
        *time_interleaved(
            lambda: F.gelu(matmul.linear(x, weight, bias), approximate="tanh"),
            lambda: matmul.linear_gelu(x, weight, bias),
        ),
    )
    grad, c_proj, pre_act = randn(N, C), randn(C, 4 * C), randn(N, 4 * C)
    bias_grad = torch.zeros(4 * C, device="cuda")

    def recompute() -> None:
        dgrad = matmul.linear_dgrad(grad, c_proj)
        gelu.gelu_backward(pre_act, dgrad, bias_grad, recompute=True)

    def separate() -> None:
        dgrad = matmul.linear_dgrad(grad, c_proj)
        gelu.gelu_backward(pre_act, dgrad, bias_grad, recompute=False)

    def fused() -> None:
        accumulate_column_sums(matmul.linear_dgrad_dgelu(grad, c_proj, pre_act), bias_grad)

    first, second, third = time_interleaved(recompute, fused, separate)
    print_row("mlp.c_proj backward, GELU recomputed; saved, with DGELU", first, second)
    print_row("DGELU in the epilogue; in a kernel of its own", second, third)


def dropout() -> None:
    """Of a sublayer output before a LayerNorm, forward and backward; and the embedding."""
    residual, output, grad = randn(N, C), randn(N, C), randn(N, C)
    weight, grads = torch.ones(C, device="cuda"), torch.zeros(3 * C, device="cuda")
    bias_grad = torch.zeros(C, device="cuda")
    [seed] = DropoutRate(DROPOUT, residual.device).draw_seeds(1)

    def by_torch() -> None:
        dropped, mask = torch.native_dropout(output, DROPOUT, True)
        _, saved = layer_norm.add_layer_norm(residual, dropped, weight, weight)
        grad_residual, _ = layer_norm.layer_norm_backward(
            grad, saved, weight, residual, grads[: 2 * C]
        )
        grad_output = torch.ops.aten.native_dropout_backward(grad_residual, mask, 1 / (1 - DROPOUT))
        bias_grad.add_(grad_output.sum(0, dtype=bias_grad.dtype))

    def fused() -> None:
        _, saved = layer_norm.add_layer_norm(residual, output, weight, weight, seed)
        layer_norm.layer_norm_backward(grad, saved, weight, residual, grads)

    label = "dropout and LayerNorm, forward and backward; fused"
    print_row(label, *time_interleaved(by_torch, fused))
    rows, wte_grad = randn(N, C), torch.zeros(V, C, device="cuda")
    idx = torch.randint(0, V, (N,), device="cuda")
    print_row(
        "gradient of the token embedding",
        *time_interleaved(
            lambda: wte_grad.index_add_(0, idx, rows.float()),
            lambda: embedding.embedding_backward(rows, idx, wte_grad),
        ),
    )


def lm_head() -> None:
    hidden, weight = randn(8192, C), randn(V, C)
    flops = 2.0 * 8192 * V * C
    times = time_interleaved(lambda: hidden @ weight.t(), lambda: matmul.linear(hidden, weight))
    print_row("logits of 8,192 tokens", *times, flops=flops)
    weight_grad, grad = torch.zeros(V, C, device="cuda"), randn(8192, V)
    times = time_interleaved(
        lambda: torch.addmm(
            weight_grad, grad.t(), hidden, out_dtype=torch.float32, out=weight_grad
        ),
        lambda: matmul.accumulate_wgrad(weight_grad, grad, hidden),
    )
    print_row("lm_head, wgrad, accumulated in fp32", *times, flops=flops)
    logits = matmul.linear(hidden, weight)
    targets = torch.randint(0, V, (8192,), device="cuda")
    (loss,) = time_interleaved(lambda: cross_entropy_in_place(logits, targets, 1e-5))
    print(f"| cross-entropy and its gradient in place | | {loss:.0f} | | |", flush=True)


def attention(batch: int, length: int, heads: int, head_dim: int) -> None:
    """Backward, with the gradients of q, k and v packed and summed for the bias."""
    qkv, grad = randn(batch, length, 3, heads, head_dim), randn(batch * length, heads * head_dim)
    bias_grad = torch.zeros(3 * heads * head_dim, device="cuda")
    sdpa, triton = SdpaAttention(), TritonAttention()
    _, saved = triton.forward(qkv, None)

    def sdpa_forward_backward() -> None:
        sdpa.backward(grad, sdpa.forward(qkv, None)[1], bias_grad)

    (forward,) = time_interleaved(lambda: sdpa.forward(qkv, None))
    both, backward = time_interleaved(
        sdpa_forward_backward, lambda: triton.backward(grad, saved, bias_grad)
    )
    flops = 5 * batch * heads * head_dim * length * (length + 1)
    shape = f"{batch} sequences of {length}, {heads} heads of {head_dim}"
    print_row(f"attention backward, {shape}", both - forward, backward, flops=flops)
    [seed] = DropoutRate(DROPOUT, qkv.device).draw_seeds(1)
    times = time_interleaved(
        lambda: sdpa.backward(grad, sdpa.forward(qkv, seed)[1], bias_grad),
        lambda: triton.backward(grad, triton.forward(qkv, seed)[1], bias_grad),
    )
    print_row(f"with dropout, forward and backward, {shape}", *times, flops=7 / 5 * flops)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| operation | baseline, us | chosen, us | difference | TFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    linear_layers()
    mlp_epilogues()
    lm_head()
    dropout()
    for shape in ((32, 1024, 12, 64), (64, 256, 6, 64), (32, 1024, 24, 32), (32, 1024, 6, 128)):
        attention(*shape)


if __name__ == "__main__":
    main()
