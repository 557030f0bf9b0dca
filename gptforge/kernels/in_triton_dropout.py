"""Which numbers are dropped, as dropout.py says it in torch. Imported by the kernels in Triton."""

import triton
import triton.language as tl


@triton.jit
def row_words(row, keys):
    """The words of rows."""
    return _words(row, tl.load(keys))


@triton.jit
def column_words(column, keys):
    """The words of columns."""
    return _words(column, tl.load(keys + 1))


@triton.jit
def _words(place, key):
    x = place.to(tl.uint32) * 0x9E3779B1 + key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 15)) * 0x735A2D97
    return (x ^ (x >> 16)) | 1


@triton.jit
def is_kept(row_word, column_word, DROPPED: tl.constexpr):
    """Whether the number where they cross stays."""
    return row_word * column_word >= 2 * DROPPED


@triton.jit
def factor_of(DROPPED: tl.constexpr):
    """What the numbers that stay are multiplied by."""
    return 2147483648.0 / (2147483648.0 - DROPPED)
