"""Dropout masks inside kernels; `gptforge.kernels.dropout` explains the hash."""

import triton
import triton.language as tl


@triton.jit
def hash_rows(row, seeds):
    """Hash of row indices with the first seed."""
    return _hash(row, tl.load(seeds))


@triton.jit
def hash_columns(column, seeds):
    """Hash of column indices with the second seed."""
    return _hash(column, tl.load(seeds + 1))


@triton.jit
def _hash(index, seed):
    x = index.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (x ^ (x >> 16)) | 1


@triton.jit
def is_kept(row_hash, column_hash, THRESHOLD: tl.constexpr):
    """Whether dropout keeps the element at this row and column."""
    # THRESHOLD is p * 2**31, which fits an int32; the product is a uint32.
    return row_hash * column_hash >= 2 * THRESHOLD


@triton.jit
def dropout_scale(THRESHOLD: tl.constexpr):
    """1 / (1 - p)."""
    return 2147483648.0 / (2147483648.0 - THRESHOLD)


@triton.jit
def dropout(x, row_hash, column_hash, THRESHOLD: tl.constexpr):
    """Dropout of a tile x (ROWS, BLOCK)."""
    keep = is_kept(row_hash[:, None], column_hash[None, :], THRESHOLD)
    return tl.where(keep, x * dropout_scale(THRESHOLD), 0.0)
