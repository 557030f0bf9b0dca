"""Triton kernels; the modules of the same name in `gptforge.kernels` import them on first use.

Rows are tokens, columns are channels. A kernel that sums over rows writes one partial sum per
program, and `reductions.accumulate` adds these up in a fixed order, so results are bit for bit
deterministic. Only `embedding_backward` uses atomics.
"""
