"""Presets: named configurations, as differences from the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptforge.config import Config, Value, merge
from gptforge.errors import UserError
from gptforge.recipe import make_recipe


@dataclass(frozen=True)
class Preset:
    """A one-line description and the fields that differ from the defaults."""

    description: str
    values: Mapping[str, Value]


AUTO = "auto"  # the preset whose values follow from the text; see `recipe`
FINETUNE = "finetune"
"""The preset whose steps and rates follow from model and text; see `builders.text_presets`."""


def _gpt2(description: str, n_layer: int, n_head: int, n_embd: int, batch_size: int) -> Preset:
    """A larger GPT-2 with a global batch of 128 like the small one, in smaller micro-batches."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    batch = {"batch_size": batch_size, "gradient_accumulation_steps": 128 // batch_size}
    return Preset(description, {**shape, **batch})


_FINETUNE: dict[str, Value] = {
    "dropout": 0.1, "random_offset": True, "eval_tokens": 2**20,
    "batch_size": 4, "gradient_accumulation_steps": 1,
    # The rates follow from the model; until they do, any explicit one is valid beside min_lr.
    "min_lr": 0.0, "warmup_steps": 1, "beta2": 0.99, "ema": 0.99,
}  # fmt: skip
_DEBUG: dict[str, Value] = {
    "tokenizer": "char", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32,
    "context_length": 32, "batch_size": 4, "gradient_accumulation_steps": 2,
    "max_steps": 20, "warmup_steps": 5, "dtype": "float32", "eval_tokens": 4096,
    "log_every": 1, "eval_every": 10, "save_every": 10, "sample_every": 10,
}  # fmt: skip

# The shakespeare presets are those of a megabyte until the size of the text is known.
PRESETS: dict[str, Preset] = {
    "gpt2": Preset("GPT-2 small, 124M parameters", {}),
    "gpt2-medium": _gpt2("GPT-2 medium, 355M parameters", 24, 16, 1024, batch_size=32),
    "gpt2-large": _gpt2("GPT-2 large, 774M parameters", 36, 20, 1280, batch_size=16),
    "gpt2-xl": _gpt2("GPT-2 xl, 1.56B parameters", 48, 25, 1600, batch_size=8),
    "shakespeare": Preset(
        "characters, 11M parameters: best quality on one GPU for a text of 0.3 to 5 MB",
        make_recipe(10**6, "gpu").values,
    ),
    "shakespeare-cpu": Preset(
        "a small model with its own vocabulary: minutes on two CPU cores",
        make_recipe(10**6, "cpu").values,
    ),
    FINETUNE: Preset("a pretrained model, --init_from, on a text of your own", _FINETUNE),
    "debug": Preset("a tiny model: seconds on a CPU, to test the installation", _DEBUG),
    # Last: without a text, it is GPT-2 small.
    AUTO: Preset("model, vocabulary and regularization that fit the size of the text", {}),
}


def get_preset(name: str) -> Config:
    """Build the Config of a preset.

    Raises:
        UserError: for an unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: unknown preset; there are {', '.join(PRESETS)}")
    return merge(Config(preset=name), PRESETS[name].values, source=f"preset {name}")
