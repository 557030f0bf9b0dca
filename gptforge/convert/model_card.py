"""Model cards: the model, its training and its evaluation, as far as they are known."""

import json
from dataclasses import dataclass
from pathlib import Path

from gptforge.config import Config
from gptforge.convert.bundle import ModelBundle
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.files import read_bounded
from gptforge.printable import MAX_NAME, escape_markdown, printable
from gptforge.report.metrics import History
from gptforge.tokenizers import Tokenizer

CURVES, METRICS, SAMPLES = "training_curves.png", "metrics.jsonl", "samples.md"
MAX_COPY_BYTES = 2**30  # of a file copied from a run folder


@dataclass(frozen=True)
class Origin:
    """The run that a model comes from."""

    config: Config
    step: int
    history: History
    curves: Path | None  # of the picture, if there is one


def model_card(
    bundle: ModelBundle,
    origin: Origin | None,
    *,
    title: str,
    usage: str,
    front_matter: dict[str, str],
) -> str:
    """A model card in Markdown, with front matter for the Hugging Face Hub: YAML values by key.

    `origin` is the run that the model comes from, None if it was imported; `usage` is Markdown.
    """
    c = bundle.config
    lines = ["---", *(f"{name}: {value}" for name, value in front_matter.items()), "---", ""]
    lines += [f"# {escape_markdown(title)}", ""]
    lines += [
        f"{one_line_description(bundle, None)}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| Layers, heads, embedding | {c.n_layer}, {c.n_head}, {c.n_embd} |",
        f"| Context | {c.block_size} tokens |",
        f"| Tokenizer | {bundle.tokenizer.name}, {bundle.tokenizer.vocab_size:,} ids |",
    ]
    lines += _training_rows(origin) if origin else []
    lines += ["", "## Use", "", usage, ""]
    if origin and origin.curves:
        lines += ["## Training", "", f"![Training curves]({CURVES})", ""]
    lines += [
        "## Limits",
        "",
        "The model continues text in the style of its training data. It is not a source of facts, "
        "follows no instructions and has not been made safe; it may repeat training text verbatim.",
        "",
    ]
    return "\n".join(lines)


def one_line_description(bundle: ModelBundle, config: Config | None) -> str:
    """One line about a model; `config` is that of its run."""
    num_params = formulas.num_params(bundle.config)
    text = f", on {printable(Path(config.input).name, MAX_NAME)}" if config else ""
    return f"A GPT-2 with {num_params:,} parameters, trained with GPT-Forge{text}"


def example_prompt(tokenizer: Tokenizer) -> str:
    """A prompt that the tokenizer can encode, as a Python string literal."""
    text = "Once"
    try:
        tokenizer.encode(text)
    except UserError:
        # A character tokenizer: each id is one character.
        chars = [tokenizer.decode_bytes([i]).decode("utf-8") for i in range(tokenizer.vocab_size)]
        text = next((char for char in chars if char.isalpha()), chars[0])
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def copy_run_file(path: Path, folder: Path) -> None:
    """Copy a file of a run into an export; symlinks are not followed."""
    (folder / path.name).write_bytes(read_bounded(path, MAX_COPY_BYTES, follow_symlinks=False))


def _training_rows(origin: Origin) -> list[str]:
    config = origin.config
    tokens = origin.step * config.tokens_per_step
    decay = "" if config.schedule == "constant" else f" to {config.min_lr:g}, {config.schedule}"
    lines = [
        f"| Training text | {escape_markdown(Path(config.input).name)} |",
        f"| Steps | {origin.step:,} of {config.max_steps:,}, {tokens:,} tokens |",
        f"| Optimizer | {config.optimizer}, learning rate {config.max_lr:g}{decay} |",
    ]
    scores = [
        (e["val_loss"], e["val_bpb"]) for e in origin.history.evals if e["step"] == origin.step
    ]
    final = origin.history.final
    if final and final["best_step"] == origin.step:
        scores.append((final["final_val_loss"], final["final_val_bpb"]))
    if scores and scores[-1][0] is not None:
        loss, bits_per_byte = scores[-1]
        lines.append(f"| Held-out loss | {loss:.4f} nats per token |")
        lines.append(f"| Held-out bits per byte | {bits_per_byte:.4f} |")
        lines.append(f"| Held out | {config.val_fraction:.0%} of the text |")
    return lines
