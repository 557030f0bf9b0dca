"""Sums over the rows of large tensors, which kernels leave in parts.

Each program of a kernel leaves the sum of the rows that it saw; the parts are added up afterwards,
in the same order each time. That takes a few microseconds, however little there is to do, so those
of a block are added up by one kernel.

Shapes: P parts, C columns.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MAX_FUSED = 4
"""Sums that one kernel makes."""
COLUMNS, ROWS = 32, 512
"""What a program of it adds up at a time."""


class PendingReductions:
    """Sums whose parts are kept until several can be added up at once."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, parts: Tensor, sums: Tensor) -> None:
        """As `add_parts`, some time before `finish` has returned."""
        self._waiting.append((parts, sums))

    def flush(self) -> None:
        """Add up what has not been added up yet."""
        for start in range(0, len(self._waiting), MAX_FUSED):
            _add_up(self._waiting[start : start + MAX_FUSED])
        self._waiting.clear()


def accumulate_partials(
    partials: Tensor, out: Tensor, pending: PendingReductions | None = None
) -> None:
    """`sums` (C,) float32 grows by the sum of the rows of `parts` (P, C or more), on a CUDA device.

    At once, or with the others that are `unfinished`.
    """
    if pending is not None:
        pending.add(partials, out)
    else:
        _add_up([(partials, out)])


def accumulate_column_sums(
    x: Tensor, out: Tensor, pending: PendingReductions | None = None
) -> None:
    """`sums` (C,) float32 grows by the sum of x (N, C) over its rows; see `add_parts`."""
    if not x.is_cuda:
        out += x.sum(0, dtype=out.dtype)
        return
    rows, columns = x.shape
    assert x.is_contiguous()
    programs = min(256, math.ceil(rows / 32))
    parts = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _triton().column_sums[(programs, math.ceil(columns / 512))](
        x, parts, rows, math.ceil(rows / programs), columns, BLOCK=512, ROWS=16,
    )  # fmt: skip
    accumulate_partials(parts, out, pending)


def _add_up(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    programs = 0
    ends: list[int] = []
    operands: list[Tensor | int] = []
    # What only fills the places up begins where no program is any more.
    for parts, sums in [*pairs, *[pairs[0]] * (MAX_FUSED - len(pairs))]:
        assert sums.is_contiguous() and sums.dtype == parts.dtype == torch.float32
        assert parts.is_contiguous() and parts.size(1) >= len(sums)
        operands += [parts, sums, len(parts), len(sums), parts.size(1)]
        if len(ends) < len(pairs):
            programs += math.ceil(len(sums) / COLUMNS)
        ends.append(programs)
    _triton().add_parts[(programs,)](*operands, *ends[:-1], BLOCK=COLUMNS, ROWS=ROWS, num_warps=16)


def _triton() -> Any:
    """The kernels; importing Triton takes a second, so it waits until here."""
    from gptforge.kernels import in_triton

    return in_triton
