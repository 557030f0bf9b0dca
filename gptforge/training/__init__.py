"""The training loop: trainer, steps, backends, data parallelism, signals and loss monitoring."""
