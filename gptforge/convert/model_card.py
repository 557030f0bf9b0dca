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
from gptforge.report.metrics import Event, History
from gptforge.tokenizers import Tokenizer

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MAX_COPY_BYTES = 2**30  # of a file copied from a run folder


@dataclass(frozen=True)
class Origin:
    """The run that a model comes from."""

    config: Config
    step: int
    history: History
    curves: Path | None  # of the picture, if there is one


def model_card(
    bundle: ModelBundle, origin: Origin | None, *, title: str, is_space: bool = False
) -> str:
    """A model card in Markdown, with front matter for the Hugging Face Hub.

    `origin` is the run that the model comes from; None: it was imported.
    """
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["escape_markdown"] = escape_markdown
    # A JSON string is a YAML string.
    environment.filters["json"] = lambda text: json.dumps(text, ensure_ascii=False)
    run = origin.config if origin else Config()
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        is_space=is_space,
        title=title,
        description=one_line_description(bundle, None),
        c=bundle.config,
        tokenizer=bundle.tokenizer,
        origin=origin,
        run=run,
        text=Path(run.input).name,
        num_tokens=origin.step * run.tokens_per_step if origin else 0,
        score=_score(origin) if origin else None,
        prompt=example_prompt(bundle.tokenizer),
        # Transformers raises an IndexError beyond the context; a prompt is at most 4 tokens.
        max_new_tokens=max(1, min(100, bundle.config.block_size - 4)),
    )


def one_line_description(bundle: ModelBundle, config: Config | None) -> str:
    """One line about a model; `config` is that of its run, or of an import, which has no text."""
    origin = "exported with GPT-Forge"  # another program may have trained it
    if config and config.input:
        text = printable(Path(config.input).name, MAX_NAME)
        origin = f"trained with GPT-Forge, on {text}"
    return f"A GPT-2 with {formulas.num_params(bundle.config):,} parameters, {origin}"


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


def _score(origin: Origin) -> Event | None:
    """The checkpoint's loss on all held-out text if that is known, else its last evaluation."""
    history = origin.history
    scores = [event for event in history.evals if event["step"] == origin.step]
    if history.final and history.best and history.best["step"] == origin.step:
        scores.append(history.best)
    return scores[-1] if scores and scores[-1]["val_loss"] is not None else None
