"""What to give for memory: time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """Results that the backward pass makes again, instead of finding them in memory."""

    activation_checkpointing: bool = False
    """Keep only what goes into each block (activation checkpointing, Chen et al., 2016)."""
    loss_chunk: int = 0
    """Tokens whose logits are made at a time; 0: as many as is fastest."""


DEFAULT_SAVINGS = Savings()
