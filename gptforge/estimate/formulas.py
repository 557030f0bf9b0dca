"""Parameters, FLOPs and bytes of a configuration: pure functions, each formula only here."""

import math

from gptforge.config import GPTConfig

LOSS_CHUNK_TOKENS, LOSS_CHUNK_VOCAB_SIZE = 8192, 50304
"""Tokens whose logits of so many ids are made at a time where they are made in pieces: more is
hardly faster."""
SMALL_N_EMBD = 512
"""Width up to which a model is small: its passes take long beside its products."""


def gelu_save_interval(n_embd: int) -> int:
    """Of so many blocks one keeps the GELU's output, where an update is written out."""
    return 1 if n_embd <= SMALL_N_EMBD else 2


def default_loss_chunk(vocab_size: int) -> int:
    """Tokens whose logits are made at a time, where an update is written out."""
    return LOSS_CHUNK_TOKENS * max(1, LOSS_CHUNK_VOCAB_SIZE // max(1, vocab_size))


def num_params(config: GPTConfig) -> int:
    """Distinct parameters; the tied output layer counts once."""
    c, wide = config.n_embd, config.mlp_ratio * config.n_embd
    attention = (c * 3 * c + 3 * c) + (c * c + c)
    mlp = (c * wide + wide) + (wide * c + c)
    block = attention + mlp + 2 * 2 * c
    return num_embedding_params(config) + config.n_layer * block + 2 * c


def num_embedding_params(config: GPTConfig) -> int:
    """Parameters of the token table, which is the output layer as well, and the position table."""
    return (config.vocab_size + config.block_size) * config.n_embd


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """FLOPs to learn from one token, forward and backward: 6N + 12 * L * C * T.

    nanoGPT's convention, after PaLM's appendix B (Chowdhery et al., 2022); N is all parameters.
    """
    attention = 12 * config.n_layer * config.n_embd * context_length
    return 6 * num_params(config) + attention


def training_memory(
    config: GPTConfig,
    context_length: int,
    sequences: int,
    *,
    mixed_precision: bool,
    manual_backward: bool = False,
    activation_checkpointing: bool = False,
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
    width = 2 if mixed_precision else 4
    tokens = sequences * context_length
    stream = width if manual_backward else 4
    gelu_sides = (
        1 + 1 / gelu_save_interval(config.n_embd)
        if manual_backward and not activation_checkpointing
        else 2
    )
    inner = width * (2 + 3 + 1 + gelu_sides * config.mlp_ratio)
    a_layer = 2 * stream + inner
    # On the way back a layer needs about as much again for gradients.
    layers = (
        config.n_layer * stream + 2 * a_layer
        if activation_checkpointing
        else config.n_layer * a_layer
    )
    if manual_backward:
        layers += width * 2 * config.mlp_ratio
    chunk = min(
        tokens, loss_chunk or (default_loss_chunk(config.vocab_size) if manual_backward else tokens)
    )
    logits = chunk * config.vocab_size * (width if manual_backward else 4 + width)
    count = num_params(config)
    return {
        "weights": (4 + 2 * manual_backward) * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
        "snapshot": 12 * count,
        "activations": math.ceil(tokens * layers * config.n_embd) + logits,
    }


def fsdp_memory(
    config: GPTConfig,
    context_length: int,
    sequences: int,
    *,
    world_size: int,
    mixed_precision: bool,
    activation_checkpointing: bool = False,
    loss_chunk: int = 0,
) -> int:
    """Memory on each of several ranks that share a model (FSDP2): an estimate from above.

    Weights, gradients and moments are cut to pieces. Whole at a time are the tables and three
    blocks, in the narrow type, with gradients in it and once more in float32. Activations are those
    of one process; a save puts one tensor together at a time.
    """
    width = 2 if mixed_precision else 4
    block = (num_params(config) - num_embedding_params(config)) // config.n_layer
    whole = (2 * width + 4) * (num_embedding_params(config) + 3 * block)
    lone = training_memory(
        config,
        context_length,
        sequences,
        mixed_precision=mixed_precision,
        activation_checkpointing=activation_checkpointing,
        loss_chunk=loss_chunk,
    )
    activations = lone["activations"]
    if mixed_precision:
        # The residual stream is as narrow as the weights.
        layers = config.n_layer + (4 if activation_checkpointing else config.n_layer)
        activations -= 2 * layers * sequences * context_length * config.n_embd
    return 16 * num_params(config) // world_size + whole + activations


def zero1_memory(
    config: GPTConfig,
    context_length: int,
    sequences: int,
    *,
    world_size: int,
    activation_checkpointing: bool = False,
    loss_chunk: int = 0,
) -> int:
    """Memory on each of several ranks that share a model whose updates are written out.

    Weights and moments are cut to pieces; narrow weights, gradients and the tables are whole.
    """
    parts = training_memory(
        config,
        context_length,
        sequences,
        mixed_precision=True,
        manual_backward=True,
        activation_checkpointing=activation_checkpointing,
        loss_chunk=loss_chunk,
    )
    count, tokens = num_params(config), sequences * context_length
    # What LayerNorms and attention keep of each token, and libraries take to work in.
    small = 4 * config.n_layer * (config.n_head + 4) * tokens + 2**28
    return (
        12 * count // world_size
        + 6 * count
        + 4 * num_embedding_params(config)
        + parts["activations"]
        + small
    )


def checkpoint_bytes(config: GPTConfig) -> int:
    """Size of a checkpoint: weights and AdamW's two moments, float32 each, and a little more."""
    return 3 * 4 * num_params(config) + 4 * 2**20
