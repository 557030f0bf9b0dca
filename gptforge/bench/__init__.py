"""Benchmarks of training and generation, with other implementations in the same process."""
