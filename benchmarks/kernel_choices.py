"""What the pieces of an update take at GPT-2 small's shapes: our choice beside torch's.

    python benchmarks/kernel_choices.py

One micro-batch of 32 windows of 1024 on a CUDA GPU. Products by torch and by cuBLASLt with its
kernels tried out, alone and with what comes behind them; the passes between them, with and without
dropout; attention. Medians of events on the GPU, in microseconds, of work that was asked for before
it begins: Python's own time does not count. The GPU is warm: all are timed twice, in turns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels import embedding, gelu, layer_norm, matmul
from gptforge.kernels.attention import SdpaAttention, TritonAttention
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.dropout import draw_dropout_seeds
from gptforge.kernels.reductions import accumulate_column_sums

N, C, V = 32768, 768, 50304
ROUNDS, WARM_UP = 15, 3
ASKING = 20_000_000
"""Cycles that the GPU waits for Python to ask for all rounds."""
SHARE = 0.2
"""That dropout drops."""
Work = Callable[[], object]


def microseconds(work: Work) -> float:
    for _ in range(WARM_UP):
        work()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    torch.cuda._sleep(ASKING)
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(1e3 * begin.elapsed_time(end) for begin, end in marks)[ROUNDS // 2]


def in_turns(*works: Work) -> list[float]:
    """The better of two medians of each."""
    turns = [[microseconds(work) for work in works] for _ in range(2)]
    return [min(times) for times in zip(*turns, strict=True)]


def row(what: str, one: float, two: float, flops: float = 0.0) -> None:
    rate = f"{flops / two / 1e6:.0f}" if flops else ""
    print(f"| {what} | {one:.0f} | {two:.0f} | {one - two:+.0f} | {rate} |", flush=True)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16() * shape[-1] ** -0.5


def linear_layers() -> None:
    for name, out, inner in (("c_attn", 3 * C, C), ("attn.c_proj", C, C), ("c_fc", 4 * C, C),
                             ("mlp.c_proj", C, 4 * C)):  # fmt: skip
        x, weight, bias, upstream = draw(N, inner), draw(out, inner), draw(out), draw(N, out)
        flops = 2.0 * N * out * inner
        forth = in_turns(
            lambda x=x, w=weight, b=bias: torch.addmm(b, x, w.t()),
            lambda x=x, w=weight, b=bias: matmul.linear(x, w, b),
        )
        row(f"{name}, forward with bias", *forth, flops)
        back = in_turns(
            lambda u=upstream, w=weight: u @ w,
            lambda u=upstream, w=weight: matmul.linear_dgrad(u, w),
        )
        row(f"{name}, gradient of its input", *back, flops)
        sums = torch.zeros(out, inner, device="cuda")
        to_weight = in_turns(
            lambda g=sums, u=upstream, x=x: torch.addmm(
                g, u.t(), x, out_dtype=torch.float32, out=g
            ),
            lambda g=sums, u=upstream, x=x: matmul.accumulate_wgrad(g, u, x),
        )
        row(f"{name}, gradient of its weight, added up", *to_weight, flops)


def around_the_gelu() -> None:
    x, weight, bias = draw(N, C), draw(4 * C, C), draw(4 * C)
    row(
        "c_fc with bias, then the GELU; the two in one",
        *in_turns(
            lambda: F.gelu(matmul.linear(x, weight, bias), approximate="tanh"),
            lambda: matmul.linear_gelu(x, weight, bias),
        ),
    )
    upstream, down, inner = draw(N, C), draw(C, 4 * C), draw(N, 4 * C)
    sums = torch.zeros(4 * C, device="cuda")

    def again() -> None:
        gelu.gelu_backward(inner, matmul.linear_dgrad(upstream, down), sums, recompute=True)

    def apart() -> None:
        gelu.gelu_backward(inner, matmul.linear_dgrad(upstream, down), sums, recompute=False)

    def in_one() -> None:
        accumulate_column_sums(matmul.linear_dgrad_dgelu(upstream, down, inner), sums)

    first, second, third = in_turns(again, in_one, apart)
    row(
        "back through mlp.c_proj, the GELU made again; kept, its slope in the product",
        first,
        second,
    )
    row("the slope in the product; in a pass", second, third)


def dropping() -> None:
    """From a branch in front of a LayerNorm, there and back, and from attention's shares."""
    stream, branch, upstream = draw(N, C), draw(N, C), draw(N, C)
    vector, sums = torch.ones(C, device="cuda"), torch.zeros(3 * C, device="cuda")
    to_bias = torch.zeros(C, device="cuda")
    [drop] = draw_dropout_seeds(1, SHARE, stream.device)

    def by_torch() -> None:
        left, kept = torch.native_dropout(branch, SHARE, True)
        _, norm = layer_norm.add_layer_norm(stream, left, vector, vector)
        to_stream, _ = layer_norm.layer_norm_backward(upstream, norm, vector, stream, sums[: 2 * C])
        to_branch = torch.ops.aten.native_dropout_backward(to_stream, kept, 1 / (1 - SHARE))
        to_bias.add_(to_branch.sum(0, dtype=to_bias.dtype))

    def inside() -> None:
        _, norm = layer_norm.add_layer_norm(stream, branch, vector, vector, drop)
        layer_norm.layer_norm_backward(upstream, norm, vector, stream, sums)

    row("dropout and LayerNorm, there and back; in its passes", *in_turns(by_torch, inside))
    rows, table = draw(N, C), torch.zeros(V, C, device="cuda")
    idx = torch.randint(0, V, (N,), device="cuda")
    row(
        "the token table's gradient",
        *in_turns(
            lambda: table.index_add_(0, idx, rows.float()),
            lambda: embedding.embedding_backward(rows, idx, table),
        ),
    )


def the_head() -> None:
    hidden, table = draw(8192, C), draw(V, C)
    flops = 2.0 * 8192 * V * C
    torchs, ours = in_turns(lambda: hidden @ table.t(), lambda: matmul.linear(hidden, table))
    row("logits of 8,192 tokens", torchs, ours, flops)
    sums, upstream = torch.zeros(V, C, device="cuda"), draw(8192, V)
    added = in_turns(
        lambda: torch.addmm(sums, upstream.t(), hidden, out_dtype=torch.float32, out=sums),
        lambda: matmul.accumulate_wgrad(sums, upstream, hidden),
    )
    row("the table's gradient by them, added up", *added, flops)
    logits = matmul.linear(hidden, table)
    targets = torch.randint(0, V, (8192,), device="cuda")
    (loss,) = in_turns(lambda: cross_entropy_in_place(logits, targets, -1, 1e-5))
    print(f"| their loss and gradient in place | | {loss:.0f} | | |", flush=True)


def attention(windows: int, length: int, heads: int, size: int) -> None:
    """The way back, its gradients side by side and added up for the bias."""
    qkv, upstream = draw(windows, length, 3, heads, size), draw(windows * length, heads * size)
    sums = torch.zeros(3 * heads * size, device="cuda")
    torchs, ours = SdpaAttention(), TritonAttention()
    _, kept = ours.forward(qkv, None)

    def there_and_back() -> None:
        torchs.backward(upstream, torchs.forward(qkv, None)[1], sums)

    (forth,) = in_turns(lambda: torchs.forward(qkv, None))
    both, back = in_turns(there_and_back, lambda: ours.backward(upstream, kept, sums))
    flops = 5 * windows * heads * size * length * (length + 1)
    shape = f"{windows} windows of {length}, {heads} heads of {size}"
    row(f"attention's way back, {shape}", both - forth, back, flops)
    [drop] = draw_dropout_seeds(1, SHARE, qkv.device)
    dropping = SdpaAttention(SHARE)

    def by_torch() -> None:
        dropping.backward(upstream, dropping.forward(qkv, drop)[1], sums)

    def by_us() -> None:
        ours.backward(upstream, ours.forward(qkv, drop)[1], sums)

    both, back = in_turns(by_torch, by_us)
    row(f"the same with dropout, there and back, {shape}", both, back, 7 / 5 * flops)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| what | before, us | chosen, us | difference | TFLOP/s |")
    print("| --- | --- | --- | --- | --- |")
    linear_layers()
    around_the_gelu()
    the_head()
    dropping()
    for shape in ((32, 1024, 12, 64), (64, 256, 6, 64), (32, 1024, 24, 32), (32, 1024, 6, 128)):
        attention(*shape)


if __name__ == "__main__":
    main()
