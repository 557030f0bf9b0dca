"""`gptforge plan`: what a run will be and cost, and whether it fits, before anything is trained."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass

from gptforge.cli.flags import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.estimate.plan import (
    CHINCHILLA_TOKENS_PER_PARAM,
    MAX_USEFUL_EPOCHS,
    DatasetPlan,
    DiskPlan,
    MemoryPlan,
    RunPlan,
    StepPlan,
    TrainingPlan,
)
from gptforge.printable import print_stderr, safe_print
from gptforge.report.format import format_count, format_duration

INDENT = 12
"""Columns in front of what a row says."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """Say what a run will be and cost, and train nothing: takes all flags of training, and this."""

    json: bool = False
    """Print one JSON object on standard output, and the rest on standard error."""


def plan(args: list[str]) -> int:
    """Work it out and print it; 1 if it does not fit into memory or onto the disk."""
    parsed, given = parse_train_args(args, cls=PlanConfig, prog="gptforge plan")
    assert isinstance(parsed, PlanConfig)
    say = print_stderr if parsed.json else safe_print
    names = [field.name for field in dataclasses.fields(Config)]
    config = resolve_preset(Config(**{n: getattr(parsed, n) for n in names}), given, log=say)
    from gptforge.builders.plan import make_plan

    made = make_plan(config, given, say)
    if parsed.json:
        print(json.dumps(dataclasses.asdict(made)))
    else:
        for name, words in _rows(made):
            safe_print(_row(name, words))
        for warning in made.warnings:
            safe_print(f"warning: {warning}")
    return 0 if made.ok else 1


def _row(name: str, words: str) -> str:
    lines = textwrap.wrap(
        words,
        100,
        initial_indent=f"{name:<{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def _rows(made: TrainingPlan) -> list[tuple[str, str]]:
    model, flops, time = made.model, made.flops, made.time
    how_long = time.how
    if time.seconds is not None and time.tokens_per_second is not None:
        how_long = (
            f"about {format_duration(time.seconds)}, {time.tokens_per_second:,.0f} tokens a second, for "
            f"updates alone; {time.how}"
        )
    return [
        (
            "model",
            f"{model.preset or 'custom'}: {model.n_layer} layers x {model.n_embd}, {model.n_head} "
            f"heads, {model.block_size:,} positions, {model.vocab_size:,} rows of tokens",
        ),
        (
            "parameters",
            f"{model.parameters:,}; {model.non_embedding_parameters:,} without the tables of "
            "tokens and positions",
        ),
        ("text", _text(made.text)),
        ("a step", _step(made.step, made.memory)),
        *_run(made.run),
        (
            "FLOPs",
            f"{format_count(flops.per_token)} a token ({flops.formula}), {format_count(flops.per_step)} a "
            f"step, {format_count(flops.run)} in all",
        ),
        *_memory(made.memory),
        ("disk", _disk(made.disk)),
        ("time", how_long),
    ]


def _text(text: DatasetPlan) -> str:
    size = f"{text.characters:,} characters; " if text.characters else ""
    held_out = f"{text.held_out_tokens:,}" if text.held_out_tokens else "none"
    now = "; prepared now, and kept for the training" if text.prepared_now else ""
    return (
        f"{text.path}: {size}{text.tokens:,} {text.tokenizer} tokens to learn from, "
        f"{held_out} held out{now}"
    )


def _step(step: StepPlan, memory: MemoryPlan) -> str:
    fewer = memory.fits and step.micro_batch < step.requested_micro_batch
    why = f", for {step.requested_micro_batch} there is no memory" if fewer else ""
    return (
        f"{step.sequences:,} windows of {step.context_length:,}, {step.tokens:,} tokens, in "
        f"micro-batches of {step.micro_batch}{why}"
    )


def _run(run: RunPlan) -> list[tuple[str, str]]:
    # One that reads but a little of its text reads more than nothing.
    epochs = f"{run.epochs:.1f}" if run.epochs >= 0.1 else f"{run.epochs:.2g}"
    return [
        (
            "the run",
            f"{run.steps:,} steps, {run.tokens:,} tokens: {epochs} epochs over this text, "
            f"{run.tokens_per_parameter:.2g} tokens a parameter",
        ),
        (
            "",
            f"(up to about {MAX_USEFUL_EPOCHS} epochs are as good as new text, Muennighoff et al. "
            f"2023; about {CHINCHILLA_TOKENS_PER_PARAM} tokens a parameter make the most of the FLOPs, "
            "Hoffmann et al. 2022)",
        ),
    ]


def _memory(memory: MemoryPlan) -> list[tuple[str, str]]:
    free = "how much is free is not known"
    if memory.free_bytes is not None:
        verdict = "it fits" if memory.fits else "it does not fit"
        free = f"{_size(memory.free_bytes)} are free, {verdict}"
    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.parts.items())
    return [
        ("memory", f"{_size(memory.needed_bytes)} at most, on {memory.device}; {free}"),
        ("", f"{parts} (a snapshot is what a save copies first)"),
    ]


def _disk(disk: DiskPlan) -> str:
    there = f"; a run at step {disk.steps_saved:,} is there" if disk.steps_saved else ""
    return (
        f"{disk.checkpoints} x {_size(disk.checkpoint_bytes)} of checkpoints at most, in "
        f"{disk.out_dir}; {_size(disk.free_bytes)} are free{there}"
    )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
