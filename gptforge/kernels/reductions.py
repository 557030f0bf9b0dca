"""Sums over the rows of large tensors (bias gradients), in two deterministic steps.

Each program of a kernel writes the sum of its rows; a second kernel adds these partial sums up in a
fixed order, since atomics would not be deterministic. The second kernel takes a few microseconds
however small the sums are, so those of a transformer block are deferred to one launch.

Shapes: P partial sums, C columns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptforge.kernels.launch import uses_triton

MAX_FUSED = 4
"""Sums that one launch of the second kernel finishes."""
COLUMNS, ROWS = 32, 512
"""Tile of a program in the second kernel."""


class PendingReductions:
    """Partial sums to finish in few launches."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, partials: Tensor, out: Tensor) -> None:
        """Defer `accumulate_partials(partials, out)` until `flush`."""
        self._pending.append((partials, out))

    def flush(self) -> None:
        """Add up all that is pending."""
        for start in range(0, len(self._pending), MAX_FUSED):
            _accumulate(self._pending[start : start + MAX_FUSED])
        self._pending.clear()


Pending = PendingReductions | None
"""Where to defer a sum; None: a separate launch."""


def accumulate_partials(partials: Tensor, out: Tensor, pending: Pending = None) -> None:
    """out += partials.sum(0), now or, with `pending`, on its `flush`; for CUDA tensors.

    `out` is (C,), partials (P, C or more), both float32; columns past the C-th are ignored.
    """
    if pending is not None:
        pending.add(partials, out)
    else:
        _accumulate([(partials, out)])


def accumulate_column_sums(x: Tensor, out: Tensor, pending: Pending = None) -> None:
    """out += x.sum(0) with x (N, C) and out (C,) float32; see `accumulate_partials`."""
    if not uses_triton(x):
        out += x.sum(0, dtype=out.dtype)
        return
    from gptforge.kernels.triton import reductions as kernels

    rows, columns = x.shape
    assert x.is_contiguous()
    programs = min(256, math.ceil(rows / 32))
    partials = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    kernels.column_sums[(programs, math.ceil(columns / 512))](
        x, partials, rows, math.ceil(rows / programs), columns, BLOCK=512, ROWS=16,
    )  # fmt: skip
    accumulate_partials(partials, out, pending)


def _accumulate(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    from gptforge.kernels.triton import reductions as kernels

    programs = 0
    ends: list[int] = []
    args: list[Tensor | int] = []
    # A Triton kernel has a fixed number of arguments: unused ones repeat the first pair, and get no
    # programs.
    for partials, out in [*pairs, *[pairs[0]] * (MAX_FUSED - len(pairs))]:
        assert out.is_contiguous() and out.dtype == partials.dtype == torch.float32
        assert partials.is_contiguous() and partials.size(1) >= len(out)
        args += [partials, out, len(partials), len(out), partials.size(1)]
        if len(ends) < len(pairs):
            programs += math.ceil(len(out) / COLUMNS)
        ends.append(programs)
    kernels.accumulate[(programs,)](*args, *ends[:-1], BLOCK=COLUMNS, ROWS=ROWS, num_warps=16)
