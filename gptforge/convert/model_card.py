"""A model card: what the model is, what it learned from, what it scored. Only what is known."""

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

CURVES, METRICS = "training_curves.png", "metrics.jsonl"
MAX_COPY_BYTES = 2**30
"""Bytes of a run's picture or metrics that go into an export."""


@dataclass(frozen=True)
class Origin:
    """The run that a model came from, as far as its folder tells."""

    config: Config
    step: int
    history: History
    curves: Path | None
    """The run's picture, if it has one."""


def model_card(
    bundle: ModelBundle,
    origin: Origin | None,
    *,
    title: str,
    usage: str,
    front_matter: dict[str, str],
) -> str:
    """Markdown with the front matter that the Hub reads.

    Args:
        parts: the model.
        origin: where it comes from; None: not from a run of this program.
        title: its name.
        usage: Markdown that says how to use it.
        front: lines of front matter.
    """
    c = bundle.config
    lines = ["---", *(f"{name}: {value}" for name, value in front_matter.items()), "---", ""]
    lines += [f"# {escape_markdown(title)}", ""]
    lines += [
        f"A GPT-2 with {formulas.num_params(c):,} parameters, trained with GPT-Forge.",
        "",
        "| | |",
        "| --- | --- |",
        f"| Blocks, heads, width | {c.n_layer}, {c.n_head}, {c.n_embd} |",
        f"| Context | {c.block_size} tokens |",
        f"| Tokenizer | {bundle.tokenizer.name}, {bundle.tokenizer.vocab_size:,} ids |",
    ]
    lines += _learned(origin) if origin else []
    lines += ["", "## Use", "", usage, ""]
    if origin and origin.curves:
        lines += ["## Training", "", f"![Training curves]({CURVES})", ""]
    lines += [
        "## Limits",
        "",
        "The model goes on from text in the manner of what it read. It knows no facts, follows no "
        "instructions and has not been made safe; it may repeat what it read, word for word.",
        "",
    ]
    return "\n".join(lines)


def one_line_description(bundle: ModelBundle, config: Config | None) -> str:
    """One line about a model, for forms that have no room for a card; None: not from a run."""
    text = f", on {printable(Path(config.input).name, MAX_NAME)}" if config else ""
    return f"A GPT-2 with {formulas.num_params(bundle.config):,} parameters, trained with GPT-Forge{text}"


def example_prompt(tokenizer: Tokenizer) -> str:
    """Something to begin with that this vocabulary can write, as a literal of Python's."""
    text = "Once"
    try:
        tokenizer.encode(text)
    except UserError:
        # Only an alphabet lacks letters, and each of its ids is one.
        letters = [tokenizer.decode_bytes([i]).decode("utf-8") for i in range(tokenizer.vocab_size)]
        text = next((letter for letter in letters if letter.isalpha()), letters[0])
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)


def copy_run_file(path: Path, folder: Path) -> None:
    """Copy a file of a run into an export; a link is not followed."""
    (folder / path.name).write_bytes(read_bounded(path, MAX_COPY_BYTES, follow_symlinks=False))


def _learned(origin: Origin) -> list[str]:
    config = origin.config
    tokens = origin.step * config.tokens_per_step
    lines = [
        f"| Text | {escape_markdown(Path(config.input).name)} |",
        f"| Updates | {origin.step:,} of {config.max_steps:,}, {tokens:,} tokens |",
        f"| Optimizer | {config.optimizer}, learning rate {config.max_lr:g} to {config.min_lr:g} |",
    ]
    scores = [event for event in origin.history.evals if event.get("step") == origin.step]
    if scores and scores[-1].get("val_loss") is not None:
        score = scores[-1]
        lines.append(f"| Held-out loss | {score['val_loss']:.4f} nats per token |")
        lines.append(f"| Held-out bits per byte | {score['val_bpb']:.4f} |")
        lines.append(f"| Held out | {config.val_fraction:.0%} of the text |")
    return lines
