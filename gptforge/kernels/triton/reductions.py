"""Row reductions; see `gptforge.kernels.reductions`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def column_sums(
    x,  # (rows, columns)
    partials,  # (programs, columns) fp32
    rows, rows_per_program, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partials[p] = sum of program p's rows of x."""
    pid = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(pid * rows_per_program + rows_per_program, rows)
    for start in range(0, rows_per_program, ROWS):
        row = pid * rows_per_program + start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & in_row[None, :]
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(partials + pid.to(tl.int64) * columns + column, total, mask=in_row)


@triton.jit(
    do_not_specialize=["count_a", "count_b", "count_c", "count_d", "end_a", "end_b", "end_c"]
)
def accumulate(
    partials_a, out_a, count_a, columns_a, stride_a,  # (count, stride) fp32 and (columns,) fp32
    partials_b, out_b, count_b, columns_b, stride_b,
    partials_c, out_c, count_c, columns_c, stride_c,
    partials_d, out_d, count_d, columns_d, stride_d,
    end_a, end_b, end_c,  # programs before end_a serve a, those before end_b serve b, ...
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out += partials.sum(0), for up to four reductions in one launch."""
    # No list of tensors in Triton: select the arguments by program id.
    pid = tl.program_id(0)
    partials, out, count, columns, stride = partials_a, out_a, count_a, columns_a, stride_a
    block = pid
    if pid >= end_a:
        partials, out, count, columns, stride = partials_b, out_b, count_b, columns_b, stride_b
        block = pid - end_a
    if pid >= end_b:
        partials, out, count, columns, stride = partials_c, out_c, count_c, columns_c, stride_c
        block = pid - end_b
    if pid >= end_c:
        partials, out, count, columns, stride = partials_d, out_d, count_d, columns_d, stride_d
        block = pid - end_c
    column = block * BLOCK + tl.arange(0, BLOCK)
    in_row = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & in_row[None, :]
        tile = tl.load(partials + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tile, 0)
    tl.store(out + column, tl.load(out + column, mask=in_row, other=0.0) + total, mask=in_row)
