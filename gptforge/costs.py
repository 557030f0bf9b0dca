"""Parameters, FLOPs and bytes of a configuration: pure functions, each formula only here."""

from gptforge.config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Distinct parameters; the tied output layer counts once."""
    c, wide = config.n_embd, config.mlp_ratio * config.n_embd
    attention = (c * 3 * c + 3 * c) + (c * c + c)
    mlp = (c * wide + wide) + (wide * c + c)
    block = attention + mlp + 2 * 2 * c
    return (config.vocab_size + config.block_size) * c + config.n_layer * block + 2 * c


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """FLOPs to learn from one token, forward and backward: 6N + 12 * L * C * T.

    nanoGPT's convention, after PaLM's appendix B (Chowdhery et al., 2022); N is all parameters.
    """
    attention = 12 * config.n_layer * config.n_embd * context_length
    return 6 * parameters(config) + attention


def training_bytes(config: GPTConfig, context_length: int, windows: int, *, mixed: bool) -> int:
    """Memory to train with so many windows in a micro-batch: an estimate from above.

    Weights, gradients and AdamW's moments take 16 bytes a parameter, a snapshot for saving 12 more.
    What the backward pass needs is counted layer by layer for flash attention, in units of C bytes
    a token: the two normalised inputs (the residual stream is float32), their outputs, q, k and v,
    the attention's output, and both sides of the GELU.
    """
    width = 2 if mixed else 4
    a_layer = 2 * 4 + width * (2 + 3 + 1 + 2 * config.mlp_ratio)
    logits = config.vocab_size * (4 + width)
    token = config.n_layer * a_layer * config.n_embd + logits
    return 28 * parameters(config) + windows * context_length * token


def checkpoint_bytes(config: GPTConfig) -> int:
    """Size of a checkpoint: weights and AdamW's two moments, float32 each, and a little more."""
    return 3 * 4 * parameters(config) + 4 * 2**20
