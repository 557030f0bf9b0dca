"""`gptforge plan`: what a run will do and need, and whether it fits, before training."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from typing import Any

from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.printable import print_stderr, safe_print
from gptforge.report.format import format_count, format_duration, format_epochs
from gptforge.report.log_handler import log_to

INDENT = 12
ADVICE = (
    "(up to about 4 epochs are as good as new text, Muennighoff et al. 2023; about 20 tokens per "
    "parameter are compute-optimal, Hoffmann et al. 2022)"
)


@dataclass(frozen=True)
class PlanConfig(Config):
    """Show what a run will do and need, without training. Takes all flags of train, and this."""

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
        print(json.dumps(plan))
    else:
        for label, text in _rows(plan):
            label, indent = label.ljust(INDENT), " " * INDENT
            wrap = textwrap.TextWrapper(
                100, label, indent, break_long_words=False, break_on_hyphens=False
            )
            safe_print(wrap.fill(text))
        for warning in plan["warnings"]:
            safe_print(f"warning: {warning}")
    return 0 if plan["ok"] else 1


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    model, step, flops, disk = plan["model"], plan["step"], plan["flops"], plan["disk"]
    per_token, per_step, run = map(
        format_count, (flops["per_token"], flops["per_step"], flops["run"])
    )
    is_reduced = plan["memory"]["fits"] and step["micro_batch"] < step["requested_micro_batch"]
    reason = f", since {step['requested_micro_batch']} do not fit" if is_reduced else ""
    return [
        (
            "model",
            f"{model['preset'] or 'custom'}: {model['n_layer']} layers x {model['n_embd']}, "
            f"{model['n_head']} heads, block_size {model['block_size']:,}, vocab_size "
            f"{model['vocab_size']:,}",
        ),
        (
            "parameters",
            f"{model['parameters']:,}; {model['non_embedding_parameters']:,} without embeddings",
        ),
        ("text", _describe_text(plan["text"])),
        (
            "step",
            f"{step['sequences']:,} sequences of {step['context_length']:,}, {step['tokens']:,} "
            f"tokens, in micro-batches of {step['micro_batch']}{reason}",
        ),
        *_run_rows(plan["run"]),
        (
            "FLOPs",
            f"{per_token} per token ({flops['formula']}), {per_step} per step, {run} in total",
        ),
        *_memory_rows(plan["memory"]),
        (
            "disk",
            f"{disk['checkpoints']} x {_format_bytes(disk['checkpoint_bytes'])} of checkpoints at "
            f"most, in {disk['out_dir']}; {_describe_free(disk['free_bytes'])}",
        ),
        ("time", _describe_time(plan["time"])),
    ]


def _describe_text(text: dict[str, Any]) -> str:
    size = f"{text['characters']:,} characters; " if text["characters"] else ""
    val_tokens = f"{text['held_out_tokens']:,}" if text["held_out_tokens"] else "none"
    prepared = "; prepared now, and kept for training" if text["prepared_now"] else ""
    return (
        f"{text['path']}: {size}{text['tokens']:,} {text['tokenizer']} tokens "
        f"({text['tokenizer_ids']:,} ids) to train on, {val_tokens} held out{prepared}"
    )


def _run_rows(run: dict[str, Any]) -> list[tuple[str, str]]:
    epochs = format_epochs(run["epochs"])
    ratio = f"{run['tokens_per_parameter']:.2g} tokens per parameter"
    steps = f"{run['steps']:,} steps, {run['tokens']:,} tokens: {epochs} epochs over this text"
    return [("run", f"{steps}, {ratio}"), ("", ADVICE)]


def _memory_rows(memory: dict[str, Any]) -> list[tuple[str, str]]:
    free = _describe_free(memory["free_bytes"])
    if memory["free_bytes"] is not None:
        free += ", it fits" if memory["fits"] else ", it does not fit"
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in memory["parts"].items())
    needed = f"{_format_bytes(memory['needed_bytes'])} at most, on {memory['device']}"
    return [
        ("memory", f"{needed}; {free}"),
        ("", f"{parts} (a snapshot is the copy that a save writes)"),
    ]


def _describe_time(time: dict[str, Any]) -> str:
    if time["seconds"] is None:
        return str(time["how"])
    return (
        f"about {format_duration(time['seconds'])}, {time['tokens_per_second']:,.0f} tokens per "
        f"second, for the steps alone; {time['how']}"
    )


def _describe_free(count: int | None) -> str:
    return "how much is free is unknown" if count is None else f"{_format_bytes(count)} free"


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
