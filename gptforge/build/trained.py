"""From a run on the disk back to a model that writes."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from gptforge import costs, files
from gptforge.checkpoint import store as checkpoints
from gptforge.config import Config, GPTConfig
from gptforge.convert.hf import is_hf, read_hf
from gptforge.convert.hf_tokenizer import OURS
from gptforge.convert.hub import OPENAI
from gptforge.convert.parts import Parts, fitted
from gptforge.data.corpus import Wanted, open_corpus
from gptforge.data.documents import Form
from gptforge.data.finding import counted
from gptforge.data.sources import Kind
from gptforge.data.stream import TokenStream
from gptforge.data.text import BUNDLED, find_text
from gptforge.errors import UserError
from gptforge.evaluate.heldout import HeldOut, HeldOutLoss
from gptforge.generate.language_model import LanguageModel
from gptforge.hardware import choose_device, choose_precision
from gptforge.printable import print_note
from gptforge.report.patience import Patience
from gptforge.tokenizers import byte_lengths

SMALL = 30_000_000
"""Parameters below which a CPU writes faster in float32: the weights fit its caches anyway."""
TINY = 4_000_000
"""Parameters below which one CPU thread writes a text as fast as two."""


def load(
    run: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    say: Callable[[str], None] | None = None,
) -> LanguageModel:
    """The model that a run made, ready to write.

    Args:
        run: a run folder (its best checkpoint is taken, else its last), a checkpoint folder, or a
            folder that transformers or `export --to hf` wrote.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: type to write in: auto, float32, bfloat16 or float16. Logits are always float32.
        say: told what should be known while writing; None: standard error is.

    Raises:
        UserError: if there is no checkpoint there, or it is damaged.
    """
    parts = open_parts(run)
    place, _ = choose_device(str(device))
    return LanguageModel(
        parts.model().to(place),
        parts.tokenizer,
        dtype=writing_dtype(dtype, place, parts.config),
        settled=True,
        say=say or print_note,
    )


def spare_threads(writer: LanguageModel) -> None:
    """Give this process one CPU thread if its model is small; for programs, not for libraries.

    A text from a small model takes no longer on one: its steps are microseconds. On more, wherever
    other programs want the cores too, each step waits for the last of them: 10 to 60 times longer.
    """
    if writer.device.type == "cpu" and costs.parameters(writer.model.config) < TINY:
        torch.set_num_threads(1)


def open_parts(run: str | Path) -> Parts:
    """Shape, weights and tokenizer of a run, a checkpoint or an exported model.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if not isinstance(run, str | Path) or not str(run):
        raise UserError(f"{run!r} is no run: give the path of a run folder or a checkpoint folder")
    if is_hf(Path(run)):
        return read_hf(Path(run))
    if not Path(run).exists() and str(run).removeprefix("openai-community/") in OPENAI:
        raise UserError(
            f"{run} does not exist here: fetch it once, gptforge import {run} runs/{Path(run).name}"
            f", and give runs/{Path(run).name}"
        )
    tried: set[Path] = set()
    while True:
        path = checkpoints.resolve(str(run))
        try:
            return _parts_of(path)
        except (UserError, OSError):
            # A training beside us may have deleted it since: then there is a newer one.
            if path.is_dir() or path in tried:
                raise
            tried.add(path)


def _parts_of(path: Path) -> Parts:
    if reason := checkpoints.damage(path, checkpoints.TO_WRITE_WITH):
        others = [
            other.as_posix()
            for other in sorted(path.parent.glob("step-*"), reverse=True)
            if other != path and not checkpoints.damage(other, checkpoints.TO_WRITE_WITH)
        ]
        which = f"{others[0]} is whole" if others else "give another checkpoint folder"
        raise UserError(f"{path.as_posix()} is damaged: {reason}; {which}")
    config = checkpoints.read_config(path)
    tokenizer = checkpoints.read_tokenizer(path)
    if tokenizer.size > config.vocab_size:
        raise UserError(f"{path.as_posix()}: the tokenizer has more ids than the model has rows")
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL)
    return Parts(config.model, fitted(tensors, config.model, source=path.as_posix()), tokenizer)


def writing_dtype(flag: str, device: torch.device, config: GPTConfig) -> torch.dtype:
    """The type to write in that `--dtype` asks for, or the one that is fastest here."""
    if flag not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {flag}: give auto, float32, bfloat16 or float16")
    if flag == "auto" and device.type == "cpu" and costs.parameters(config) < SMALL:
        return torch.float32
    return choose_precision(flag, device).dtype


def evaluate_run(
    run: str | Path,
    *,
    data: str = "",
    encoding: str = "",
    field: str = "",
    kind: Kind | Literal["auto"] = "auto",
    device: str = "auto",
) -> HeldOutLoss:
    """Judge a run's model by another text, or by the part of its own that it held out.

    Args:
        run: as `load` takes it.
        data: a text, judged as a whole, or shards, by what they hold out, else as a whole; empty:
            what the run held out.
        encoding: of `data`; empty: utf-8, whatever the run's own text is written in.
        field: of JSON lines or columns in `data` that holds the text; empty: text.
        kind: what `data` holds; auto goes by its name.
        device: as `load` takes it.

    Raises:
        UserError: if there is no model or no such text, or the run held nothing out.
    """
    for flag, value in (("encoding", encoding), ("field", field), ("kind", kind)):
        if value not in ("", "auto") and not data:
            raise UserError(f"--{flag} is that of the text of --data: give both, or neither")
    writer = load(run, device=device)
    state: dict[str, Any] | None = None
    if is_hf(Path(run)):
        config = Config(context_length=writer.model.config.block_size)
        own = Path(run) / OURS
        tokenizer_file = own if own.is_file() else Path(run) / checkpoints.TOKENIZER
    else:
        path = checkpoints.resolve(str(run))
        tokenizer_file = path / checkpoints.TOKENIZER
        config = checkpoints.read_config(path)
        state = checkpoints.read_state(path) if (path / checkpoints.STATE).exists() else None
    sha256 = None if state is None else str(state["text_sha256"])
    form = Form(config.field, config.encoding)
    if data:
        form = Form(field or Form.field, encoding or Form.encoding)
    wanted = Wanted(
        tokenizer=writer.tokenizer,
        val_fraction=0.0 if data else config.val_fraction,
        form=form,
        kind=kind if data else config.kind,
        split_by_name=bool(data) or config.split_by_name,
        headerless=config.headerless,
        insists_on_tokenizer=True,
        model_tokenizer=tokenizer_file.as_posix(),
        is_to_judge=bool(data),
    )
    if data:
        inputs = state.get("inputs") if state else None
        learned = frozenset(map(str, inputs) if isinstance(inputs, list) else ())
        tokens = _given(data, wanted, run, sha256, learned, config)
    else:
        tokens = _held_back(run, wanted, sha256, config)
    if len(tokens) < 2:
        raise UserError(f"{data or config.input}: 2 tokens are needed to judge anything")
    held_out = HeldOut(
        tokens,
        byte_lengths(writer.tokenizer),
        context_length=config.context_length,
        batch_size=config.batch_size,
    )
    precision = choose_precision(config.dtype, writer.device)
    waits, batches = Patience(f"judging by {held_out.tokens:,} tokens"), itertools.count(1)

    def show_progress() -> bool:
        waits(next(batches), held_out.batches)
        return False

    score = held_out.evaluate_until(show_progress, writer.model, precision)
    assert isinstance(score, HeldOutLoss), "nothing stops it"
    return score


def _given(
    data: str,
    wanted: Wanted,
    run: str | Path,
    sha256: str | None,
    learned: frozenset[str],
    config: Config,
) -> TokenStream:
    """What to judge by in `--data`; says which part that is, and if it was learned."""
    corpus = open_corpus(Path(data), wanted, say=print_note)
    holds_out = len(corpus.held_out) > 0
    if holds_out:
        print_note(f"note: judged by the part that {data} holds out, not by the rest")
    # A smaller share of the same text lies within a larger one.
    was_held_out = holds_out and corpus.val_fraction <= config.val_fraction
    if sha256 == corpus.sha256 and not was_held_out:
        instead = "; without --data the part that was held out is judged"
        print_note(
            f"warning: {data} is what {run} learned from: this says how well it is remembered"
            f"{instead if config.val_fraction else ''}"
        )
    elif sha256 != corpus.sha256 and (
        known := corpus.inputs_of("val" if holds_out else "train") & learned
    ):
        files = f"{counted(len(known), 'file', 'files')} of " if len(corpus.inputs) > 1 else ""
        print_note(
            f"warning: {files}{data} went into the training of {run}, whole or in part: this says "
            "how well it is remembered"
        )
    return corpus.held_out if holds_out else corpus.train


def _held_back(run: str | Path, wanted: Wanted, sha256: str | None, config: Config) -> TokenStream:
    """The part of its own text that a run did not learn."""
    if sha256 is None:
        raise UserError(
            f"{run} is a model without its run, and does not say which text it has not learned: "
            "give one with --data PATH"
        )
    missing = f"the text that {run} learned, {config.input}, is not here: give a text with --data"
    # Seen from another folder, the text that comes along is elsewhere; its content tells.
    is_there = config.input == BUNDLED or Path(config.input).exists()
    is_gone = not is_there and not files.expand(config.input)
    if is_gone and Path(config.input).name != "input.txt":
        raise UserError(missing)
    try:
        corpus = open_corpus(find_text("" if is_gone else config.input), wanted, say=print_note)
    except UserError as error:
        raise UserError(
            f"what {run} learned, {config.input}, cannot be read any more: it has changed or is "
            f"damaged ({error}); give a text with --data"
        ) from None
    if sha256 != corpus.sha256:
        raise UserError(
            missing
            if is_gone
            else f"{config.input} has changed since {run} learned it, and so has the part that was "
            "held out: give a text with --data"
        )
    if not len(corpus.held_out):
        raise UserError(f"{run} held nothing out: give a text with --data PATH")
    return corpus.held_out
