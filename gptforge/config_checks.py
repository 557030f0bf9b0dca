"""Checks of a configuration's values, before anything is built."""

import math
import typing
from collections.abc import Callable, Collection

from gptforge.config import MAX_TOKENS_PER_STEP, TRACKERS, Config
from gptforge.errors import UserError

RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("1 or more", lambda x: x >= 1, "block_size n_layer n_head n_embd mlp_ratio context_length"),
    ("1 or more", lambda x: x >= 1, "batch_size gradient_accumulation_steps max_steps"),
    ("1 or more", lambda x: x >= 1, "log_every eval_every save_every"),
    ("0 or more", lambda x: x >= 0, "vocab_size warmup_steps eval_tokens keep_checkpoints"),
    ("0 or more", lambda x: x >= 0, "sample_every teachers teacher_steps time_limit seed"),
    ("0 or more", lambda x: x >= 0, "weight_decay grad_clip min_lr loss_chunk muon_lr"),
    ("0 or more, or -1", lambda x: x >= 0 or x == -1, "patience embedding_weight_decay"),
    ("0 or more, or -1", lambda x: x >= 0 or x == -1, "muon_weight_decay"),
    ("from 0 to below 1", lambda x: 0 <= x < 1, "val_fraction dropout beta1 beta2 ema token_noise"),
    ("from 0 to 1", lambda x: 0 <= x <= 1, "distill_weight dropout_ramp"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "decay_fraction"),
    ("above 0", lambda x: x > 0, "max_lr"),
)
"""What a value must be, the check of that, and the fields that it holds for."""


def validate(config: Config) -> None:
    """Check all values.

    Raises:
        UserError: for the first invalid value, with its flag.
    """
    c = config
    for name, hint in typing.get_type_hints(Config).items():
        value = getattr(c, name)
        if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
            raise UserError(f"--{name} {value!r} is not valid UTF-8 text: use another name")
        if isinstance(value, str) and "\0" in value:
            raise UserError(f"--{name} {value!r} has a NUL character: use another name")
        choices = typing.get_args(hint)
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: must be one of {', '.join(choices)}")
        if isinstance(value, int) and value.bit_length() > 63:
            raise UserError(f"--{name} must be below 2**63")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, not {value}")
    for words, is_valid, names in RANGES:
        for name in names.split():
            if not is_valid(getattr(c, name)):
                raise UserError(f"--{name} must be {words}, not {getattr(c, name)}")
    if c.tokens_per_step > MAX_TOKENS_PER_STEP:
        raise UserError(
            f"--batch_size {c.batch_size} x --gradient_accumulation_steps "
            f"{c.gradient_accumulation_steps} x --context_length {c.context_length} is "
            f"{c.tokens_per_step:,} tokens per step; the maximum is {MAX_TOKENS_PER_STEP:,}"
        )
    for tracker in c.trackers:
        if tracker not in TRACKERS or c.trackers.count(tracker) > 1:
            raise UserError(
                f"--tracker {c.tracker}: takes one or more of {', '.join(TRACKERS)}, separated by "
                "commas, each once"
            )
    if c.n_embd % c.n_head:
        raise UserError(
            f"--n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}: "
            f"each head has n_embd / n_head channels"
        )
    if c.context_length > c.block_size:
        raise UserError(
            f"--context_length {c.context_length} is more than --block_size {c.block_size}: "
            "the model has no position embeddings for it"
        )
    if c.min_lr > c.max_lr and c.schedule != "constant":
        raise UserError(f"--min_lr {c.min_lr} is more than --max_lr {c.max_lr}")
    if c.warmup_steps > c.max_steps:
        raise UserError(
            f"--warmup_steps {c.warmup_steps} is more than --max_steps {c.max_steps}: "
            "the learning rate would never reach --max_lr"
        )


def unused_fields(config: Config, explicit: Collection[str]) -> list[tuple[str, str]]:
    """Fields that the user set without effect, each with the reason: "without --dropout"."""
    c = config
    unused = {
        "without --optimizer muon": ("muon_lr muon_weight_decay", c.optimizer != "muon"),
        "without --teachers": ("teacher_steps distill_weight", c.teachers == 0),
        "without --dropout": ("dropout_ramp", c.dropout == 0),
        "without --schedule wsd": ("decay_fraction", c.schedule != "wsd"),
        "with --schedule constant": ("min_lr", c.schedule == "constant"),
    }
    return [
        (name, when)
        for when, (names, is_unused) in unused.items()
        for name in names.split()
        if is_unused and name in explicit
    ]
