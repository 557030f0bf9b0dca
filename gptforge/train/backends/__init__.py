"""Backends: ways to compute a loss and its gradients, one micro-batch at a time."""
