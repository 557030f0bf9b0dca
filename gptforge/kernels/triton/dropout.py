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
def load_rate(seeds):
    """Threshold p * 2**31 and scale 1 / (1 - p); load them before a loop that stores."""
    threshold = tl.load(seeds + 2).to(tl.uint32, bitcast=True)
    return threshold, tl.load(seeds + 3).to(tl.float32, bitcast=True)


@triton.jit
def is_kept(row_hash, column_hash, rate):
    """Whether dropout keeps the element at this row and column."""
    return row_hash * column_hash >= 2 * rate[0]


@triton.jit
def dropout(x, row_hash, column_hash, rate):
    """Dropout of a tile x (ROWS, BLOCK)."""
    keep = is_kept(row_hash[:, None], column_hash[None, :], rate)
    return tl.where(keep, x * rate[1], 0.0)
