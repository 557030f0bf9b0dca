"""Fused operations, one per file, each with a torch reference; the Triton kernels are in `triton/`.

Only operations that were measured to be faster than torch's are here. Importing Triton takes a
second, so wrappers import their kernels when they are called.
"""
