"""`gptforge plan`: what a run will be and cost, and whether it fits, before training."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass

from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.estimate.plan import (
    CHINCHILLA_TOKENS_PER_PARAM,
    MAX_USEFUL_EPOCHS,
    DatasetPlan,
    DiskPlan,
    MemoryPlan,
    RunPlan,
    StepPlan,
    TimePlan,
    TrainingPlan,
)
from gptforge.printable import print_stderr, safe_print
from gptforge.report.format import format_count, format_duration
from gptforge.report.log_handler import log_to

INDENT = 12


@dataclass(frozen=True)
class PlanConfig(Config):
    """Show what a run will be and cost, without training. Takes all flags of train, and this."""

    json: bool = False
    """Print one JSON object on stdout, and the rest on stderr."""


def main(argv: list[str]) -> int:
    """Print the plan; returns 1 if the run does not fit into memory or on the disk."""
    args, explicit = parse_train_args(argv, cls=PlanConfig, prog="gptforge plan")
    with log_to(print_stderr if args.json else safe_print):
        # That of a new run: an existing one does not influence the preset.
        config = resolve_preset(dataclasses.replace(args, restart=True), explicit)
        from gptforge.builders.make_plan import make_plan

        plan = make_plan(config, explicit)
    if args.json:
        print(json.dumps(dataclasses.asdict(plan)))
    else:
        for label, text in _rows(plan):
            label, indent = label.ljust(INDENT), " " * INDENT
            wrap = textwrap.TextWrapper(
                100, label, indent, break_long_words=False, break_on_hyphens=False
            )
            safe_print(wrap.fill(text))
        for warning in plan.warnings:
            safe_print(f"warning: {warning}")
    return 0 if plan.ok else 1


def _rows(plan: TrainingPlan) -> list[tuple[str, str]]:
    model, flops = plan.model, plan.flops
    shape = f"{model.n_layer} layers x {model.n_embd}, {model.n_head} heads"
    sizes = f"block_size {model.block_size:,}, vocab_size {model.vocab_size:,}"
    per_token, per_step, run = map(format_count, (flops.per_token, flops.per_step, flops.run))
    return [
        ("model", f"{model.preset or 'custom'}: {shape}, {sizes}"),
        (
            "parameters",
            f"{model.parameters:,}; {model.non_embedding_parameters:,} without embeddings",
        ),
        ("text", _describe_dataset(plan.text)),
        ("step", _describe_step(plan.step, plan.memory)),
        *_run_rows(plan.run),
        ("FLOPs", f"{per_token} per token ({flops.formula}), {per_step} per step, {run} in total"),
        *_memory_rows(plan.memory),
        ("disk", _describe_disk(plan.disk)),
        ("time", _describe_time(plan.time)),
    ]


def _describe_dataset(text: DatasetPlan) -> str:
    size = f"{text.characters:,} characters; " if text.characters else ""
    val_tokens = f"{text.held_out_tokens:,}" if text.held_out_tokens else "none"
    prepared = "; prepared now, and kept for training" if text.prepared_now else ""
    return (
        f"{text.path}: {size}{text.tokens:,} {text.tokenizer} tokens ({text.tokenizer_ids:,} ids) "
        "to train on, "
        f"{val_tokens} held out{prepared}"
    )


def _describe_step(step: StepPlan, memory: MemoryPlan) -> str:
    is_reduced = memory.fits and step.micro_batch < step.requested_micro_batch
    reason = f", since {step.requested_micro_batch} do not fit" if is_reduced else ""
    return (
        f"{step.sequences:,} sequences of {step.context_length:,}, {step.tokens:,} tokens, in "
        f"micro-batches of {step.micro_batch}{reason}"
    )


def _run_rows(run: RunPlan) -> list[tuple[str, str]]:
    # Two significant digits below 0.1, so that a fraction of an epoch is not shown as 0.
    epochs = f"{run.epochs:.1f}" if run.epochs >= 0.1 else f"{run.epochs:.2g}"
    steps = f"{run.steps:,} steps, {run.tokens:,} tokens: {epochs} epochs over this text"
    advice = (
        f"(up to about {MAX_USEFUL_EPOCHS} epochs are as good as new text, Muennighoff et al. "
        f"2023; about {CHINCHILLA_TOKENS_PER_PARAM} tokens per parameter are compute-optimal, "
        "Hoffmann et al. 2022)"
    )
    return [("run", f"{steps}, {run.tokens_per_parameter:.2g} tokens per parameter"), ("", advice)]


def _memory_rows(memory: MemoryPlan) -> list[tuple[str, str]]:
    free = "free memory is unknown"
    if memory.free_bytes is not None:
        fits = "it fits" if memory.fits else "it does not fit"
        free = f"{_format_bytes(memory.free_bytes)} free, {fits}"
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in memory.parts.items())
    return [
        ("memory", f"{_format_bytes(memory.needed_bytes)} at most, on {memory.device}; {free}"),
        ("", f"{parts} (a snapshot is the copy that a save writes)"),
    ]


def _describe_disk(disk: DiskPlan) -> str:
    return (
        f"{disk.checkpoints} x {_format_bytes(disk.checkpoint_bytes)} of checkpoints at most, in "
        f"{disk.out_dir}; {_format_bytes(disk.free_bytes)} free"
    )


def _describe_time(time: TimePlan) -> str:
    if time.seconds is None or time.tokens_per_second is None:
        return time.how
    return (
        f"about {format_duration(time.seconds)}, {time.tokens_per_second:,.0f} tokens per second, "
        f"for the steps alone; {time.how}"
    )


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
