"""Triton kernels, imported by the module of the same name in `gptforge.kernels` when it needs them.

Rows are tokens, columns are channels. A kernel that sums over rows writes one partial sum per
program; a second kernel adds these up in a fixed order (`reductions`), so results are deterministic
bit for bit. `embedding_backward` alone uses atomics.
"""
