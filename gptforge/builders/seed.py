"""Seeds of a run."""

import os

import torch

from gptforge.config import SEED_LIMIT, Config


def seed_everything(config: Config, *, rank: int = 0) -> None:
    """Seed torch, and set the precision and determinism of matmuls, before anything is built."""
    # Another seed on each rank: the same dropout mask on all of them would average less noise.
    torch.manual_seed((config.seed + rank * 0x9E3779B97F4A7C15) % SEED_LIMIT)
    # TF32 for the matmuls that stay in float32.
    torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # Required by torch, and read by cuBLAS when it initializes.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
