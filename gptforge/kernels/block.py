"""The pieces of a block between its matrix products, each in one pass over memory.

On a CUDA device they are Triton kernels, elsewhere the plain torch that they are tested against.
torch's compiler fuses as much, but takes half a minute to start, and leaves the sums for the
biases' gradients as passes of their own.

They write where their input was if it is not needed again, as the docstrings say. Gradients of
vectors are not returned but added, in float32, to what is in `sums`: at once, or with others, if
they may stay `unfinished` (sums.py). Where numbers are dropped, it happens on the way (dropout.py).

Shapes: N tokens, C channels.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.dropout import Drop, apply, for_kernel
from gptforge.kernels.sums import Unfinished, add_parts

EPS = 1e-5
"""LayerNorm's."""


class Norm(NamedTuple):
    """What the way back through a LayerNorm needs."""

    stream: Tensor
    """(N, C), what was normalised."""
    mean: Tensor
    """(N,) float32."""
    rstd: Tensor
    """(N,) float32: one over the standard deviation."""
    drop: Drop | None = None
    """What was dropped from the branch; or from the stream, if nothing was added to it."""


def embed(
    idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, drop: Drop | None = None
) -> Tensor:
    """Rows of the token table and of the position table, added up: (B, T) ids to (B * T, C).

    The tables are (V, C) and (T or more, C), the sum is rounded once, to `dtype`.
    """
    length = idx.size(1)
    if not idx.is_cuda:
        return apply(drop, (F.embedding(idx, wte) + wpe[:length]).flatten(0, 1)).to(dtype)
    assert wte.is_contiguous() and wpe.is_contiguous()
    rows, columns = idx.numel(), wte.size(1)
    out = torch.empty(rows, columns, dtype=dtype, device=idx.device)
    block, height = _tile(columns)
    keys, dropped = for_kernel(drop, idx)
    _triton().embed[(math.ceil(rows / height),)](
        idx.contiguous(), wte, wpe, out, keys, rows, length,
        columns=columns, BLOCK=block, ROWS=height, DROPPED=dropped,
    )  # fmt: skip
    return out


def add_rows(x: Tensor, idx: Tensor, table: Tensor) -> None:
    """Each row of x (N, C) is added to the row of `table` (V, C) that `idx` (N,) names.

    On a CUDA device the order of additions, and so the last bits, may differ from time to time.
    """
    if not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        table.index_add_(0, idx, x.to(table.dtype))
        return
    assert x.is_contiguous() and idx.is_contiguous() and table.is_contiguous()
    rows, columns = x.shape
    block, height = _tile(columns, numbers=2048)
    _triton().add_rows[(math.ceil(rows / height),)](
        x, idx, table, rows, columns=columns, BLOCK=block, ROWS=height
    )


def add_norm(
    stream: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    drop: Drop | None = None,
) -> tuple[Tensor, Norm]:
    """LayerNorm of stream + branch: all (N, C), the last two (C,) float32.

    The sum, which is the stream from there on, takes the branch's place. `drop` is for the branch;
    where there is none, it says what was dropped from the stream before.
    """
    if stream.is_cuda:
        return _add_norm_on_cuda(stream, branch, weight, bias, drop)
    if branch is not None:
        stream = branch.copy_(apply(drop, branch.to(weight.dtype)) + stream)
    wide = stream.to(weight.dtype)
    mean = wide.mean(1)
    rstd = (wide.var(1, correction=0) + EPS).rsqrt()
    normal = (wide - mean[:, None]) * rstd[:, None]
    return (normal * weight + bias).to(stream.dtype), Norm(stream, mean, rstd, drop)


def norm_backward(
    upstream: Tensor,
    norm: Norm,
    weight: Tensor,
    beside: Tensor | None,
    sums: Tensor,
    unfinished: Unfinished | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of stream and branch, (N, C) each; one and the same if nothing was dropped.

    That of the stream takes `upstream`'s place.

    Args:
        upstream: (N, C) gradient of the LayerNorm's output.
        norm: from the way forward.
        weight: (C,) float32.
        beside: (N, C) gradient that reaches the stream past the LayerNorm, or None.
        sums: (2 * C,) for the gradients of weight and bias; or (3 * C,), where the last third is
            for the bias of the branch that was added, whose gradient is the branch's.
        unfinished: where the sums may wait for others, if they may.
    """
    if upstream.is_cuda:
        return _norm_backward_on_cuda(upstream, norm, weight, beside, sums, unfinished)
    normal = (norm.stream.to(weight.dtype) - norm.mean[:, None]) * norm.rstd[:, None]
    wide = upstream.to(weight.dtype)
    parts = [(wide * normal).sum(0), wide.sum(0)]
    wide = wide * weight
    wide = wide - wide.mean(1, keepdim=True) - normal * (wide * normal).mean(1, keepdim=True)
    wide = wide * norm.rstd[:, None]
    upstream.copy_(wide if beside is None else wide + beside)
    to_branch = apply(norm.drop, upstream).to(upstream.dtype)
    parts.append(to_branch.sum(0, dtype=weight.dtype))
    sums += torch.cat(parts)[: len(sums)]
    return upstream, to_branch


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of (N, C)."""
    if not x.is_cuda:
        return F.gelu(x, approximate="tanh")
    out = torch.empty_like(x)
    block = 2048
    _triton().gelu[(math.ceil(x.numel() / block),)](x, out, x.numel(), BLOCK=block)
    return out


def gelu_backward(
    x: Tensor,
    upstream: Tensor,
    sums: Tensor,
    unfinished: Unfinished | None = None,
    *,
    again: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x in `upstream`'s place, and x; if `again`, the GELU of x in that of x.

    Making it again costs a third of this pass, and saves a quarter of all that is kept.
    `sums` (C,) grows by the gradient's sum over the rows.
    """
    if x.is_cuda:
        return _gelu_backward_on_cuda(x, upstream, sums, unfinished, again)
    activated = F.gelu(x, approximate="tanh") if again else x
    upstream.copy_(torch.ops.aten.gelu_backward(upstream, x, approximate="tanh"))
    sums += upstream.sum(0, dtype=sums.dtype)
    return upstream, x.copy_(activated)


def pack(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, unfinished: Unfinished | None = None
) -> Tensor:
    """(N, 3 * C) from three (N, C); `sums` (3 * C,) grows by its sum over the rows."""
    if q.is_cuda:
        return _pack_on_cuda(q, k, v, sums, unfinished)
    out = torch.cat([q, k, v], dim=1)
    sums += out.sum(0, dtype=sums.dtype)
    return out


def _add_norm_on_cuda(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, drop: Drop | None
) -> tuple[Tensor, Norm]:
    rows, columns = stream.shape
    assert stream.is_contiguous() and (branch is None or branch.is_contiguous())
    out = torch.empty_like(stream)
    mean = torch.empty(rows, dtype=torch.float32, device=stream.device)
    rstd = torch.empty_like(mean)
    block, height = _tile(columns)
    keys, dropped = for_kernel(drop, mean)
    _triton().add_norm[(math.ceil(rows / height),)](
        stream, stream if branch is None else branch, weight, bias, out, mean, rstd,
        keys, rows, EPS, columns=columns, BLOCK=block, ROWS=height,
        HAS_BRANCH=branch is not None, DROPPED=dropped,
    )  # fmt: skip
    return out, Norm(stream if branch is None else branch, mean, rstd, drop)


def _norm_backward_on_cuda(
    upstream: Tensor,
    norm: Norm,
    weight: Tensor,
    beside: Tensor | None,
    sums: Tensor,
    unfinished: Unfinished | None,
) -> tuple[Tensor, Tensor]:
    rows, columns = upstream.shape
    assert upstream.is_contiguous() and (beside is None or beside.is_contiguous())
    block, _ = _tile(columns)
    # Each thread keeps three sums of each of its columns: few rows at a time, others on their way.
    is_small, drops = block <= 512, norm.drop is not None
    stages = 1 if block > 2048 else 4 if is_small else 3
    height = (512 if drops or not is_small else 1024) // block or 1
    each = 8 if is_small or not drops else 6
    programs = min(each * multiprocessors(upstream.device), math.ceil(rows / 16))
    parts = torch.empty(programs, 3 * columns, dtype=torch.float32, device=upstream.device)
    to_branch = upstream if norm.drop is None else torch.empty_like(upstream)
    keys, dropped = for_kernel(norm.drop, parts)
    _triton().norm_backward[(programs,)](
        upstream, norm.stream, norm.mean, norm.rstd, weight,
        upstream if beside is None else beside, to_branch, parts, keys, rows,
        math.ceil(rows / (programs * height)), columns=columns, BLOCK=block, ROWS=height,
        HAS_BESIDE=beside is not None, DROPPED=dropped, STAGES=stages,
        num_warps=block // 1024 or 1,
    )  # fmt: skip
    add_parts(parts, sums, unfinished)
    return upstream, to_branch


def _gelu_backward_on_cuda(
    x: Tensor, upstream: Tensor, sums: Tensor, unfinished: Unfinished | None, again: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    assert x.is_contiguous() and upstream.is_contiguous()
    chunks = math.ceil(columns / 512)
    stages, each = (2, 16) if columns <= 2048 else (3, 6)
    programs = min(max(1, each * multiprocessors(x.device) // chunks), math.ceil(rows / 16))
    parts = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _triton().gelu_backward[(chunks, programs)](
        x, upstream, parts, rows, math.ceil(rows / (programs * 4)), columns,
        BLOCK=512, ROWS=4, AGAIN=again, STAGES=stages, num_warps=2,
    )  # fmt: skip
    add_parts(parts, sums, unfinished)
    return upstream, x


def _pack_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, unfinished: Unfinished | None
) -> Tensor:
    rows, columns = q.shape
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    out = torch.empty(rows, 3 * columns, dtype=q.dtype, device=q.device)
    programs = min(256, math.ceil(rows / 64))
    parts = torch.empty(programs, 3 * columns, dtype=torch.float32, device=q.device)
    _triton().pack[(programs, math.ceil(columns / 512), 3)](
        q, k, v, out, parts, rows, math.ceil(rows / programs), columns, BLOCK=512, ROWS=16,
    )  # fmt: skip
    add_parts(parts, sums, unfinished)
    return out


def _tile(columns: int, *, numbers: int = 4096) -> tuple[int, int]:
    """Columns and rows that a program works on at a time: so many numbers, or one row."""
    block = 1 << (columns - 1).bit_length()
    return block, max(1, numbers // block)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device: the parts that programs run on."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _triton() -> Any:
    """The kernels; importing Triton takes a second, so it waits until here."""
    from gptforge.kernels import in_triton

    return in_triton
