"""`--preset auto`: from the size of a text to a configuration that fits it.

A small text needs a small vocabulary, and is read many times: strong weight decay and dropout keep
the model from memorizing it. With more text, the model grows and both fade.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptforge.config import GPTConfig, Value
from gptforge.estimate.formulas import default_vocab_size, flops_per_token

DeviceClass = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Anchor:
    """The configuration for a text of `megabytes` to train on; sizes in between interpolate."""

    megabytes: float
    tokenizer: str  # from this size on
    n_layer: int
    n_embd: int
    context_length: int
    sequences: int  # per step
    max_steps: int
    max_lr: float
    muon_lr: float
    weight_decay: float
    muon_weight_decay: float
    dropout: float
    token_noise: float
    teachers: int  # the last column


# fmt: off
ANCHORS: dict[DeviceClass, tuple[Anchor, ...]] = {
    "gpu": (
        #       MB  tokenizer layers width T seqs steps    lr muon's decay muon's drop noise teach.
        Anchor(  0.01, "char",  4, 128,  128,  32,  1_500, 2e-3, 1e-2, 4.0, 2.0, 0.3, 0.10, 2),
        Anchor(  0.3,  "char",  6, 384,  256,  64,  2_000, 1e-3, 5e-3, 4.0, 1.6, .25, 0.08, 2),
        Anchor(  1,    "char",  6, 384,  256,  64,  2_500, 1e-3, 5e-3, 3.0, 1.2, 0.1, 0.05, 2),
        Anchor(  5,    "char",  8, 512,  256,  64,  5_000, 1e-3, 5e-3, 1.5, 0.8, 0.0, 0.01, 0),
        Anchor( 16,    "bpe",  12, 768,  512,  32,  5_000, 1e-3, 5e-3, 1.5, 0.8, 0.0, 0.00, 0),
        Anchor(100,    "gpt2", 12, 768, 1024,  32,  5_000, 1e-3, 5e-3, 0.4, 0.5, 0.0, 0.00, 0),
        Anchor(200,    "gpt2", 12, 768, 1024,  64,  5_000, 1e-3, 5e-3, 0.1, 0.4, 0.0, 0.00, 0),
        Anchor(10_000, "gpt2", 12, 768, 1024, 128, 19_000, 1e-3, 5e-3, 0.1, 0.1, 0.0, 0.00, 0),
    ),
    "cpu": (
        Anchor(  0.01, "char",  4,  64,   64,   8,  1_000, 4e-3, 1e-2, 1.0, 1.0, 0.1, 0.00, 0),
        Anchor(  0.3,  "bpe",   4, 128,  256,   8,  1_300, 4e-3, 1e-2, 0.5, 0.5, 0.0, 0.00, 0),
        Anchor(  1,    "bpe",   4, 128,  256,   8,  1_300, 4e-3, 1e-2, 0.5, 0.5, 0.0, 0.00, 0),
        Anchor(  5,    "bpe",   4, 128,  256,   8,  1_300, 4e-3, 1e-2, 0.1, 0.1, 0.0, 0.00, 0),
        Anchor( 20,    "bpe",   4, 192,  256,   8, 10_000, 3e-3, 1e-2, 0.1, 0.1, 0.0, 0.00, 0),
        Anchor(10_000, "bpe",   6, 256,  256,  32, 50_000, 2e-3, 1e-2, 0.1, 0.1, 0.0, 0.00, 0),
    ),
}
# fmt: on
FITTED_PRESETS: dict[str, DeviceClass | None] = {
    "auto": None,
    "shakespeare": "gpu",
    "shakespeare-cpu": "cpu",
}
"""Presets whose values follow from the text, and for which device; None: the one that trains."""
MAX_PRESET_MEGABYTES = 5  # the presets with a fixed device are for texts up to this size
HEAD_SIZES: dict[DeviceClass, int] = {"gpu": 64, "cpu": 32}
EMA_DECAY = 0.998
MIN_LR_RATIO = 0.1
TEACHER_STEPS_SHARE = 0.625
"""Steps of a teacher, as a share of the steps of the model that learns from it."""
MIN_SEQUENCES_OF_TEXT = 16  # a sequence is at most this fraction of the text
MAX_MICRO_BATCH_TOKENS = 2**15
SMALL_STEP_TOKENS = 2**15
"""Up to so many tokens per step the gradient is noisy, and beta2 is 0.99 instead of 0.95."""
LARGE_TEXT_BYTES = 20_000_000  # evaluations of larger texts read a part of what is held out
MIN_STEPS_SHARE = 0.5
"""With a time limit, the model shrinks until about this share of its steps fits."""
NUM_SIZES = 1000
"""Sizes of texts, evenly spaced in their logarithm, that are tried for a time limit."""
USABLE_TIME = 0.85
"""Share of a time limit for training and evaluation; saves, samples and surprises take the rest."""
EVALUATIONS = 12  # about so many in a run
VOCAB_SIZES = {"char": 128, "gpt2": 50304}
SMALL_VOCABULARIES = ("char", "byte")  # tokenizers of models that have teachers
RECIPE_FIELDS = frozenset(
    {
        *("tokenizer", "n_layer", "n_head", "n_embd", "block_size", "context_length"),
        *("batch_size", "gradient_accumulation_steps", "random_offset", "dropout", "weight_decay"),
        *("optimizer", "muon_lr", "muon_weight_decay", "token_noise"),
        *("ema", "beta2", "max_lr", "min_lr", "max_steps", "eval_tokens"),
        *("teachers", "teacher_steps"),
        *("warmup_steps", "log_every", "eval_every", "save_every", "sample_every"),
    }
)
"""Fields that a recipe sets."""


@dataclass(frozen=True)
class Recipe:
    """Fields for a text, without those that the user set."""

    values: dict[str, Value]
    is_limited: bool  # whether a time limit made the model smaller


def make_recipe(
    num_bytes: int,
    device: DeviceClass,
    *,
    preset: str = "auto",
    time_limit: float = 0.0,
    flops_per_second: float = 0.0,
    explicit: Mapping[str, Value] | None = None,
) -> Recipe:
    """Choose a configuration for a text of about `num_bytes` to train on.

    Args:
        num_bytes, device, preset: the text, what trains, and one of FITTED_PRESETS.
        time_limit: minutes to train; 0: as many as it takes.
        flops_per_second: about what training reaches; 0: unknown, and the limit changes nothing.
        explicit: fields that the user set. They win, and the others adapt to them.
    """
    fixed: dict[str, Any] = dict(explicit or {})
    anchors, megabytes = ANCHORS[device], num_bytes / 1e6
    if preset != "auto":
        megabytes = min(megabytes, MAX_PRESET_MEGABYTES)
    text = _interpolate(anchors, megabytes)
    affordable = text
    if time_limit > 0 and flops_per_second > 0 and "max_steps" not in fixed:
        budget = time_limit * 60 * USABLE_TIME * flops_per_second
        affordable = _interpolate(anchors, min(megabytes, _affordable(anchors, budget)))
    values: dict[str, Any] = {
        "tokenizer": affordable.tokenizer,
        "dropout": text.dropout,
        "weight_decay": text.weight_decay,
        "token_noise": text.token_noise,
        "ema": EMA_DECAY,
        "muon_lr": affordable.muon_lr,
        "muon_weight_decay": text.muon_weight_decay,
        "random_offset": True,
        "eval_tokens": 2**16 if device == "cpu" else 2**21 if num_bytes > LARGE_TEXT_BYTES else 0,
    }
    # FSDP shards the matrices that Muon needs whole.
    optimizer = "adamw" if fixed.get("parallel") == "fsdp" else "muon"
    values["optimizer"] = fixed.get("optimizer", optimizer)
    values |= _shape(affordable, num_bytes, HEAD_SIZES[device], fixed) | fixed
    values |= _batch(affordable, num_bytes, int(values["context_length"]), fixed) | fixed
    sequences = values["batch_size"] * values["gradient_accumulation_steps"]
    is_small = sequences * values["context_length"] <= SMALL_STEP_TOKENS
    values["beta2"] = 0.99 if is_small else 0.95
    values["max_lr"] = fixed.get("max_lr", max(affordable.max_lr, fixed.get("min_lr", 0.0)))
    values["min_lr"] = _round(values["max_lr"] * MIN_LR_RATIO)
    # The text decides how often it may be read; a time limit cuts the steps when they are timed.
    values["max_steps"] = max(affordable.max_steps, fixed.get("warmup_steps", 0))
    # A tenth of the text is held out. The forward is a third of a step's FLOPs.
    eval_tokens = min(values["eval_tokens"] or num_bytes, num_bytes / 10)
    steps_per_eval = eval_tokens / (sequences * max(1, values["context_length"])) / 3
    values |= intervals(fixed.get("max_steps", values["max_steps"]), 2 * steps_per_eval) | fixed
    is_small_vocab = values["tokenizer"] in SMALL_VOCABULARIES and "init_from" not in fixed
    values["teachers"] = fixed.get("teachers", affordable.teachers if is_small_vocab else 0)
    values["teacher_steps"] = teacher_steps(values["max_steps"]) if values["teachers"] else 0
    unset = {name: value for name, value in values.items() if name not in fixed}
    return Recipe(unset, is_limited=affordable != text)


def teacher_steps(max_steps: int) -> int:
    """Steps of each teacher of a model that makes `max_steps`."""
    return max(1, round(_round(max_steps * TEACHER_STEPS_SHARE)))


def intervals(max_steps: int, min_eval_every: float = 0) -> dict[str, int]:
    """Warmup, and steps between step lines, evaluations, checkpoints and samples."""
    quarter = round_nicely(max_steps / 4)
    return {
        "warmup_steps": max(1, min(100, max_steps // 10)),
        "log_every": round_nicely(max_steps / 100),
        "eval_every": round_nicely(max(max_steps / EVALUATIONS, min_eval_every)),
        "save_every": quarter,
        "sample_every": quarter,
    }


def _interpolate(anchors: Sequence[Anchor], megabytes: float) -> Anchor:
    """Interpolate between the anchors on both sides, and snap to usual values.

    Sizes and rates are interpolated in their logarithms, dropout and noise as they are, against the
    logarithm of the size. Rounding keeps the order, so a larger text never has a smaller model.
    """
    megabytes = min(max(megabytes, anchors[0].megabytes), anchors[-1].megabytes)
    above = next(i for i, a in enumerate(anchors[1:], 1) if a.megabytes >= megabytes)
    low, high = anchors[above - 1], anchors[above]
    share = math.log(megabytes / low.megabytes) / math.log(high.megabytes / low.megabytes)

    def linear(name: str) -> float:
        first, last = getattr(low, name), getattr(high, name)
        return float(first + share * (last - first))

    def geometric(name: str) -> float:
        first, last = getattr(low, name), getattr(high, name)
        return float(first * (last / first) ** share)

    return Anchor(
        megabytes=megabytes,
        tokenizer=(high if share == 1.0 else low).tokenizer,
        n_layer=round(geometric("n_layer")),
        n_embd=_round_width(geometric("n_embd")),
        context_length=2 ** round(math.log2(geometric("context_length"))),
        sequences=2 ** round(math.log2(geometric("sequences"))),
        max_steps=round(_round(geometric("max_steps"))),
        max_lr=_round(geometric("max_lr")),
        muon_lr=_round(geometric("muon_lr")),
        weight_decay=_round(geometric("weight_decay")),
        muon_weight_decay=_round(geometric("muon_weight_decay")),
        dropout=round(linear("dropout") * 20) / 20,
        token_noise=round(linear("token_noise"), 2),
        teachers=round(linear("teachers")),
    )


def _affordable(anchors: Sequence[Anchor], flops: float) -> float:
    """Largest text, in MB, up to which all configurations make enough of their steps in `flops`."""
    first, last = anchors[0].megabytes, anchors[-1].megabytes
    sizes = (first * (last / first) ** (i / NUM_SIZES) for i in range(NUM_SIZES + 1))
    # No bisection: the cost falls at the sizes from which there is one teacher less.
    affordable = itertools.takewhile(
        lambda size: _training_flops(_interpolate(anchors, size)) * MIN_STEPS_SHARE <= flops, sizes
    )
    return max(affordable, default=first)


def _training_flops(a: Anchor) -> float:
    vocab_size = VOCAB_SIZES.get(a.tokenizer, default_vocab_size(round(a.megabytes * 1e6)))
    model = GPTConfig(a.context_length, vocab_size, a.n_layer, n_head=1, n_embd=a.n_embd)
    tokens = a.max_steps * a.sequences * a.context_length
    # As `teachers.cost_with_teachers`, before there is a Config.
    with_teachers = 1 + a.teachers * (1 / 3 + TEACHER_STEPS_SHARE)
    return float(tokens * flops_per_token(model, a.context_length) * with_teachers)


def _shape(a: Anchor, num_bytes: int, head_size: int, fixed: Mapping[str, Any]) -> dict[str, int]:
    """Layers, widths and lengths that are valid together with those that the user set."""
    n_embd, n_head = a.n_embd, a.n_embd // head_size
    if "n_embd" in fixed:
        most = max(1, fixed["n_embd"] // head_size)
        n_head = next(n for n in range(most, 0, -1) if fixed["n_embd"] % n == 0)
    elif "n_head" in fixed:
        n_embd = max(1, round(n_embd / max(1, fixed["n_head"]))) * fixed["n_head"]
    context_length = min(a.context_length, _power_of_two(num_bytes / MIN_SEQUENCES_OF_TEXT))
    context_length = min(context_length, fixed.get("block_size", context_length))
    return {
        "n_layer": a.n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "context_length": context_length,
        "block_size": fixed.get("context_length", context_length),
    }


def _batch(
    a: Anchor, num_bytes: int, context_length: int, fixed: Mapping[str, Any]
) -> dict[str, int]:
    """Sequences per step, at most half of the text's; flags divide them into micro-batches."""
    sequences = min(a.sequences, _power_of_two(num_bytes / max(1, context_length) / 2))
    batch_size = min(sequences, _power_of_two(MAX_MICRO_BATCH_TOKENS / max(1, context_length)))
    if "gradient_accumulation_steps" in fixed:
        batch_size = max(1, round(sequences / max(1, fixed["gradient_accumulation_steps"])))
    batch_size = fixed.get("batch_size", batch_size)
    return {
        "batch_size": batch_size,
        "gradient_accumulation_steps": max(1, round(sequences / max(1, batch_size))),
    }


def _round_width(width: float) -> int:
    """Round to a multiple of 64, from 256 on of 128.

    With 448 channels, runs that shared an H200 with others ended with a CUDA error in a kernel that
    cuBLAS has for tiles of 224.
    """
    multiple = 64 if width < 256 else 128
    return round(width / multiple) * multiple


def _round(value: float) -> float:
    """Round to two significant digits."""
    return float(f"{value:.1e}")


def round_nicely(value: float) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is not above `value`; at least 1."""
    power = 10 ** math.floor(math.log10(max(1.0, value)))
    return next(int(factor * power) for factor in (5, 2, 1) if factor * power <= max(1.0, value))


def _power_of_two(value: float) -> int:
    """The largest power of two that is not above `value`; at least 1."""
    return int(2 ** math.floor(math.log2(max(1.0, value))))
