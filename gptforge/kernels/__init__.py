"""Fused operations: one a file, its torch reference beside it and its Triton kernel in `triton/`.

Only what was measured to be faster than torch's own is here. Importing Triton takes a second, so
wrappers import their kernels when they are called.
"""
