"""Presets: named configurations, as differences from the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptforge.config import Config, Value, merge
from gptforge.errors import UserError


@dataclass(frozen=True)
class Preset:
    """A one-line description and the fields that differ from the defaults."""

    description: str
    values: Mapping[str, Value]


AUTO = "auto"
"""The preset whose values follow from the text; see `builders.recipe`."""
FINETUNE = "finetune"
"""The preset whose steps and rates follow from model and text; see `builders.finetune`."""

# Larger models have smaller micro-batches, which shrink further if memory is short; the global
# batch size of all GPT-2 presets is 128.
PRESETS: dict[str, Preset] = {
    "gpt2": Preset("GPT-2 small, 124M parameters", {}),
    "gpt2-medium": Preset(
        "GPT-2 medium, 355M parameters",
        {
            "n_layer": 24,
            "n_head": 16,
            "n_embd": 1024,
            "batch_size": 32,
            "gradient_accumulation_steps": 4,
        },
    ),
    "gpt2-large": Preset(
        "GPT-2 large, 774M parameters",
        {
            "n_layer": 36,
            "n_head": 20,
            "n_embd": 1280,
            "batch_size": 16,
            "gradient_accumulation_steps": 8,
        },
    ),
    "gpt2-xl": Preset(
        "GPT-2 xl, 1.56B parameters",
        {
            "n_layer": 48,
            "n_head": 25,
            "n_embd": 1600,
            "batch_size": 8,
            "gradient_accumulation_steps": 16,
        },
    ),
    "shakespeare": Preset(
        "characters, 11M parameters: best quality on one GPU for a text of 0.3 to 5 MB",
        {
            "tokenizer": "char",
            "n_layer": 6,
            "n_head": 6,
            "n_embd": 384,
            "dropout": 0.15,
            "token_noise": 0.05,
            "block_size": 256,
            "context_length": 256,
            "random_offset": True,
            "batch_size": 64,
            "gradient_accumulation_steps": 1,
            "max_steps": 3000,
            "teachers": 2,
            "teacher_steps": 1900,
            "optimizer": "muon",
            "muon_lr": 5e-3,
            "muon_weight_decay": 1.2,
            "weight_decay": 3.0,
            "beta2": 0.99,
            "ema": 0.998,
            "log_every": 20,
            "eval_every": 200,
            "save_every": 500,
            "sample_every": 500,
        },
    ),
    "shakespeare-cpu": Preset(
        "a small model with its own vocabulary: minutes on two CPU cores",
        {
            "tokenizer": "bpe",
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 128,
            "block_size": 256,
            "context_length": 256,
            "random_offset": True,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 1500,
            "max_lr": 4e-3,
            "min_lr": 4e-4,
            "optimizer": "muon",
            "muon_lr": 1e-2,
            "muon_weight_decay": 0.5,
            "weight_decay": 0.5,
            "beta2": 0.99,
            "ema": 0.998,
            "log_every": 10,
            "eval_every": 100,
            "eval_tokens": 65536,
            "save_every": 200,
            "sample_every": 200,
        },
    ),
    FINETUNE: Preset(
        "a pretrained model, --init_from, on a text of your own",
        {
            "dropout": 0.1,
            "random_offset": True,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_lr": 1e-4,
            "min_lr": 1e-5,
            "warmup_steps": 1,
            "beta2": 0.99,
            "ema": 0.99,
            "eval_tokens": 2**20,
        },
    ),
    "debug": Preset(
        "a tiny model: seconds on a CPU, to test the installation",
        {
            "tokenizer": "char",
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "block_size": 32,
            "context_length": 32,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 20,
            "warmup_steps": 5,
            "log_every": 1,
            "eval_every": 10,
            "eval_tokens": 4096,
            "save_every": 10,
            "sample_every": 10,
            "dtype": "float32",
        },
    ),
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
