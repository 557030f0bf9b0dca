"""Parameters, FLOPs and bytes of a configuration: pure functions, each formula only here."""

import itertools
import math

from gptforge.config import Config, GPTConfig

LOSS_CHUNK_TOKENS, LOSS_CHUNK_VOCAB_SIZE = 8192, 50304
"""Tokens in a chunk of logits for a vocabulary of this size; larger chunks are hardly faster."""
LEARNED_VOCAB_SIZES = ((0.3, 320), (1.35, 2_700), (10, 4_096), (320, 32_768))
"""Sizes of a learned vocabulary by MB of text, interpolated in logarithms. Up to 4 MB they are
measured (docs/recipes.md). From 10 MB on, they grow a little faster than the number of distinct
words, which is about the square root of the size."""
SMALL_N_EMBD = 512
"""Up to this width, elementwise kernels take long compared with the matmuls beside them."""


def gelu_save_interval(n_embd: int) -> int:
    """N where the manual backward saves the GELU output of every Nth block, recomputing others."""
    return 1 if n_embd <= SMALL_N_EMBD else 2


def default_loss_chunk(vocab_size: int) -> int:
    """Tokens whose logits the manual backward computes at once."""
    return LOSS_CHUNK_TOKENS * max(1, LOSS_CHUNK_VOCAB_SIZE // max(1, vocab_size))


def default_vocab_size(num_bytes: int) -> int:
    """Number of ids to learn from a text of `num_bytes`: a multiple of 64.

    A larger vocabulary shortens the text, but each id needs enough occurrences to learn from.
    """
    first, last = LEARNED_VOCAB_SIZES[0], LEARNED_VOCAB_SIZES[-1]
    megabytes = min(max(num_bytes / 1e6, first[0]), last[0])
    (low, low_size), (high, high_size) = next(
        pair for pair in itertools.pairwise(LEARNED_VOCAB_SIZES) if megabytes <= pair[1][0]
    )
    share = math.log(megabytes / low) / math.log(high / low)
    return round(low_size * math.pow(high_size / low_size, share) / 64) * 64


def num_params(config: GPTConfig) -> int:
    """Parameters; the tied output layer counts once."""
    c, d_ff = config.n_embd, config.mlp_ratio * config.n_embd
    attention = (c * 3 * c + 3 * c) + (c * c + c)
    mlp = (c * d_ff + d_ff) + (d_ff * c + c)
    layer_norms = 2 * 2 * c
    block = attention + mlp + layer_norms
    return num_embedding_params(config) + config.n_layer * block + 2 * c


def num_embedding_params(config: GPTConfig) -> int:
    """Parameters of the token embedding, tied to the output layer, and the position embedding."""
    return (config.vocab_size + config.block_size) * config.n_embd


def flops_per_token(config: GPTConfig, context_length: int) -> int:
    """FLOPs to train on one token, forward and backward: 6N + 12 * L * C * T.

    nanoGPT's convention, after PaLM's appendix B (Chowdhery et al., 2022); N is all parameters.
    """
    attention = 12 * config.n_layer * config.n_embd * context_length
    return 6 * num_params(config) + attention


def training_memory(
    config: Config, sequences: int, *, mixed_precision: bool, manual_backward: bool = False
) -> dict[str, int]:
    """Upper estimate of the bytes to train with micro-batches of `sequences`, by what holds them.

    Master weights, gradients and AdamW's moments take 16 bytes a parameter, the snapshot of an
    asynchronous save another 12, an EMA 4 in both, and the compute copy of the manual backward 2.
    Activations are counted for each layer with flash attention, in multiples of C per token: two
    LayerNorm inputs (the residual, float32 under autograd), their outputs, q, k and v, the
    attention output, and both sides of the GELU. The manual backward keeps the residual in
    the compute dtype, and in wide models the GELU output of some blocks only. With activation
    checkpointing only the residual is saved, plus one layer's worth of the rest. Teachers
    have weights, which the manual backward copies, and logits, which are stacked.
    """
    model, checkpointing = config.model, config.activation_checkpointing
    width = 2 if mixed_precision else 4
    tokens = sequences * config.context_length
    residual = width if manual_backward else 4
    gelu_tensors: float = 2
    if manual_backward and not checkpointing:
        gelu_tensors = 1 + 1 / gelu_save_interval(model.n_embd)
    layer = 2 * residual + width * (2 + 3 + 1 + gelu_tensors * model.mlp_ratio)
    # In the backward of a layer its gradients take about as much as its activations.
    layers = model.n_layer * residual + 2 * layer if checkpointing else model.n_layer * layer
    if manual_backward:
        layers += width * 2 * model.mlp_ratio
    default_chunk = default_loss_chunk(model.vocab_size) if manual_backward else tokens
    logit_bytes = width if manual_backward else 4 + width
    logits_size = min(tokens, config.loss_chunk or default_chunk) * model.vocab_size
    logits = logits_size * logit_bytes
    params, ema = num_params(model), ema_bytes(config)
    teachers = {}
    if config.teachers:
        # Under autograd in float32 and of all tokens, with the mean and the student's once more.
        teacher_logits = 4 * (2 * config.teachers + 3) * tokens * model.vocab_size
        if manual_backward:
            teacher_logits = 2 * config.teachers * width * logits_size
        weights = (4 + 2 * manual_backward) * config.teachers * params
        teachers = {"teachers": weights + teacher_logits}
    return {
        "weights": (4 + 2 * manual_backward) * params,
        "gradients": 4 * params,
        "optimizer": (8 + ema) * params,
        "snapshot": (12 + ema) * params,
        "activations": math.ceil(tokens * layers * model.n_embd) + logits,
        **teachers,
    }


def fsdp_memory(config: Config, sequences: int, *, world_size: int, mixed_precision: bool) -> int:
    """Upper estimate of the bytes on each rank under FSDP2.

    Weights, gradients and moments are sharded. The embeddings and up to three blocks are gathered
    at a time: weights and gradients in the compute dtype, and gradients again in float32.
    """
    model = config.model
    width = 2 if mixed_precision else 4
    embeddings = num_embedding_params(model)
    block = (num_params(model) - embeddings) // model.n_layer
    gathered = (2 * width + 4) * (embeddings + 3 * block)
    activations = training_memory(config, sequences, mixed_precision=mixed_precision)["activations"]
    if mixed_precision:
        # FSDP casts the residual to the compute dtype too.
        layers = model.n_layer + (4 if config.activation_checkpointing else model.n_layer)
        activations -= 2 * layers * sequences * config.context_length * model.n_embd
    sharded = (16 + ema_bytes(config)) * num_params(model)
    return sharded // world_size + gathered + activations


def zero1_memory(config: Config, sequences: int, *, world_size: int) -> int:
    """Upper estimate of the bytes on each rank with the manual backward and sharded weights.

    Master weights and moments are sharded; compute weights, gradients and embeddings are not.
    """
    model, tokens = config.model, sequences * config.context_length
    memory = training_memory(config, sequences, mixed_precision=True, manual_backward=True)
    # What LayerNorm and attention save of each token, and the libraries' workspaces.
    small = 4 * model.n_layer * (model.n_head + 4) * tokens + 2**28
    unsharded = 6 * num_params(model) + 4 * num_embedding_params(model)
    sharded = (12 + ema_bytes(config)) * num_params(model)
    return sharded // world_size + unsharded + memory["activations"] + small


def ema_bytes(config: Config) -> int:
    """Bytes per parameter of an EMA of the weights."""
    return 4 if config.ema else 0


def checkpoint_bytes(config: Config) -> int:
    """Size of a checkpoint: weights, AdamW's moments and the EMA in fp32, 4 MiB for the rest."""
    return (12 + ema_bytes(config)) * num_params(config.model) + 4 * 2**20
