"""Why the recipe of a text is what it is, in the lines that a run logs."""

from collections.abc import Mapping
from typing import Any

from gptforge.printable import pluralize


def explain_recipe(
    preset: str,
    num_bytes: int,
    device: str,
    values: Mapping[str, Any],
    fixed: Mapping[str, Any],
    *,
    time_limit: float,
) -> tuple[str, ...]:
    """What was chosen, and why.

    Args:
        preset: name of the preset.
        num_bytes: size of the text.
        device: gpu or cpu.
        values: of all fields of the recipe.
        fixed: those of them that the user set.
        time_limit: minutes, if they made the model smaller; else 0.
    """
    v = values
    vocabulary = {
        "char": "a larger vocabulary would need more text",
        "bpe": "a vocabulary learned from this text, in proportion to its size",
        "gpt2": "enough text for GPT-2's vocabulary",
    }
    tokenizer = f"tokenizer {v['tokenizer']}"
    if v["tokenizer"] in vocabulary and "tokenizer" not in fixed:
        tokenizer += f": {vocabulary[v['tokenizer']]}"
    regularization = "they keep the model from memorizing what it reads many times"
    if not v["dropout"]:
        regularization = "with so much text, or so small a model, there is little to memorize"
    decay = f"weight_decay {v['weight_decay']:g}"
    if v["optimizer"] == "muon":
        decay += f" ({v['muon_weight_decay']:g} with Muon)"
    limited = f", as large as --time_limit {time_limit:g} allows" if time_limit else ""
    sequences = v["batch_size"] * v["gradient_accumulation_steps"]
    lines = [
        f"{preset}: about {_format_size(num_bytes)} of text to train on, {device.upper()}",
        f"  {tokenizer}",
        f"  {pluralize(v['n_layer'], 'layer', 'layers')} x {v['n_embd']}, sequences of "
        f"{v['context_length']:,} tokens{limited}",
        f"  {decay}, dropout {v['dropout']:g}, token_noise {v['token_noise']:g}: {regularization}",
        f"  {v['max_steps']:,} steps of {pluralize(sequences, 'sequence', 'sequences')}, "
        f"{v['optimizer']}, max_lr "
        f"{v['max_lr']:g}, ema {v['ema']:g}",
    ]
    if v["teachers"]:
        lines.append(
            f"  before that {pluralize(v['teachers'], 'teacher', 'teachers')} of "
            f"{v['teacher_steps'] or v['max_steps']:,} steps: the model learns from their "
            "probabilities, too"
        )
    if shown := [f"{name} {fixed[name]}" for name in sorted(fixed)]:
        lines.append(f"  explicit: {', '.join(shown)}")
    return tuple(lines)


def _format_size(num_bytes: int) -> str:
    if num_bytes < 10**6:
        return f"{num_bytes / 1e3:.3g} KB"
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes < 10**9 else f"{num_bytes / 1e9:.3g} GB"
