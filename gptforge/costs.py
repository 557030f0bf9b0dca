"""Parameters, FLOPs and bytes of a configuration: pure functions, each formula only here."""

import math

from gptforge.config import GPTConfig

HEAD_TOKENS, HEAD_VOCABULARY = 8192, 50304
"""Tokens whose logits of so many ids are made at a time where they are made in pieces: more is
hardly faster."""
FEW_CHANNELS = 512
"""Width up to which a model is small: its passes take long beside its products."""


def keeps_gelu_every(channels: int) -> int:
    """Of so many blocks one keeps the GELU's output, where an update is written out."""
    return 1 if channels <= FEW_CHANNELS else 2


def head_tokens(vocab_size: int) -> int:
    """Tokens whose logits are made at a time, where an update is written out."""
    return HEAD_TOKENS * max(1, HEAD_VOCABULARY // max(1, vocab_size))


def parameters(config: GPTConfig) -> int:
    """Distinct parameters; the tied output layer counts once."""
    c, wide = config.n_embd, config.mlp_ratio * config.n_embd
    attention = (c * 3 * c + 3 * c) + (c * c + c)
    mlp = (c * wide + wide) + (wide * c + c)
    block = attention + mlp + 2 * 2 * c
    return tables(config) + config.n_layer * block + 2 * c


def tables(config: GPTConfig) -> int:
    """Parameters of the token table, which is the output layer as well, and the position table."""
    return (config.vocab_size + config.block_size) * config.n_embd


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """FLOPs to learn from one token, forward and backward: 6N + 12 * L * C * T.

    nanoGPT's convention, after PaLM's appendix B (Chowdhery et al., 2022); N is all parameters.
    """
    attention = 12 * config.n_layer * config.n_embd * context_length
    return 6 * parameters(config) + attention


def training_parts(
    config: GPTConfig,
    context_length: int,
    windows: int,
    *,
    mixed: bool,
    by_hand: bool = False,
    recompute: bool = False,
    loss_chunk: int = 0,
) -> dict[str, int]:
    """Memory to train with so many windows at a time, by what it holds: an estimate from above.

    Weights, gradients and AdamW's moments take 16 bytes a parameter, a snapshot for saving 12 more,
    and narrow copies of the weights 2. What the backward pass needs is counted layer by layer for
    flash attention, in units of C bytes a token: the two normalised inputs (the residual stream is
    float32), their outputs, q, k and v, the attention's output, and both sides of the GELU. Written
    out (`by_hand`), the stream is narrow, and wide models keep both sides of some GELUs only. With
    `recompute` only the stream is kept, and one layer's worth of the rest.
    """
    width = 2 if mixed else 4
    tokens = windows * context_length
    stream = width if by_hand else 4
    gelu_sides = 1 + 1 / keeps_gelu_every(config.n_embd) if by_hand and not recompute else 2
    inner = width * (2 + 3 + 1 + gelu_sides * config.mlp_ratio)
    a_layer = 2 * stream + inner
    # On the way back a layer needs about as much again for gradients.
    layers = config.n_layer * stream + 2 * a_layer if recompute else config.n_layer * a_layer
    if by_hand:
        layers += width * 2 * config.mlp_ratio
    chunk = min(tokens, loss_chunk or (head_tokens(config.vocab_size) if by_hand else tokens))
    logits = chunk * config.vocab_size * (width if by_hand else 4 + width)
    count = parameters(config)
    return {
        "weights": (4 + 2 * by_hand) * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "snapshot": 12 * count,
        "activations": math.ceil(tokens * layers * config.n_embd) + logits,
    }


def sharded_bytes(
    config: GPTConfig,
    context_length: int,
    windows: int,
    *,
    ranks: int,
    mixed: bool,
    recompute: bool = False,
    loss_chunk: int = 0,
) -> int:
    """Memory on each of several ranks that share a model (FSDP2): an estimate from above.

    Weights, gradients and moments are cut to pieces. Whole at a time are the tables and three
    blocks, in the narrow type, with gradients in it and once more in float32. Activations are those
    of one process; a save puts one tensor together at a time.
    """
    width = 2 if mixed else 4
    block = (parameters(config) - tables(config)) // config.n_layer
    whole = (2 * width + 4) * (tables(config) + 3 * block)
    lone = training_parts(
        config, context_length, windows, mixed=mixed, recompute=recompute, loss_chunk=loss_chunk
    )
    activations = lone["activations"]
    if mixed:
        # The residual stream is as narrow as the weights.
        layers = config.n_layer + (4 if recompute else config.n_layer)
        activations -= 2 * layers * windows * context_length * config.n_embd
    return 16 * parameters(config) // ranks + whole + activations


def gathered_bytes(
    config: GPTConfig,
    context_length: int,
    windows: int,
    *,
    ranks: int,
    recompute: bool = False,
    loss_chunk: int = 0,
) -> int:
    """Memory on each of several ranks that share a model whose updates are written out.

    Weights and moments are cut to pieces; narrow weights, gradients and the tables are whole.
    """
    parts = training_parts(
        config,
        context_length,
        windows,
        mixed=True,
        by_hand=True,
        recompute=recompute,
        loss_chunk=loss_chunk,
    )
    count, tokens = parameters(config), windows * context_length
    # What LayerNorms and attention keep of each token, and libraries take to work in.
    small = 4 * config.n_layer * (config.n_head + 4) * tokens + 2**28
    return 12 * count // ranks + 6 * count + 4 * tables(config) + parts["activations"] + small


def checkpoint_bytes(config: GPTConfig) -> int:
    """Size of a checkpoint: weights and AdamW's two moments, float32 each, and a little more."""
    return 3 * 4 * parameters(config) + 4 * 2**20
