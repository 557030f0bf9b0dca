"""`gptforge eval RUN`: evaluate a trained model on held-out text or on tasks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError, UserError
from gptforge.printable import print_stderr, safe_print
from gptforge.report.format import format_val_loss
from gptforge.report.log_handler import log_to


@dataclass(frozen=True)
class EvalArgs:
    """Evaluate a trained model: loss, perplexity and bits per byte on held-out text."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder, or a model written by `export --to hf` or transformers."""
    data: str = ""
    """Text to evaluate on in full, or token shards with a validation split; empty: the run's own
    validation split."""
    encoding: str = ""
    """Encoding of --data, for instance latin-1; empty: utf-8."""
    field: str = ""
    """Field of a JSON line, or column, that holds the text of --data; empty: text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """Format of --data; auto: by its name."""
    raw_bin: bool = False
    """Read .bin files of --data as raw uint16 ids without a header, as nanoGPT writes them."""
    tasks: str = ""
    """hellaswag, lambada or both, instead of held-out text or in addition to --data. They are
    downloaded from the Hugging Face Hub; NAME=FILE.jsonl reads them from a file. Other names are
    tasks of lm-evaluation-harness, if the package lm_eval is installed."""
    include_path: str = ""
    """Folder with further tasks in the format of lm-evaluation-harness."""
    limit: int = 0
    """Number of examples of each task to evaluate; 0: all."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@log_to(print_stderr)
def main(argv: list[str]) -> None:
    """Evaluate and print."""
    args = parse_args(EvalArgs, argv, "gptforge eval")
    for flag in ("limit", "include_path"):
        if getattr(args, flag) and not args.tasks:
            raise UserError(f"--{flag} needs --tasks")
    prewarm_cuda(args.device)
    results: dict[str, object] = {}
    if not args.tasks or args.data:
        results |= _evaluate_text(args)
    if args.tasks:
        from gptforge.builders.run_evaluation import evaluate_tasks

        scores = evaluate_tasks(
            args.run,
            args.tasks,
            limit=args.limit,
            device=args.device,
            include_path=args.include_path,
        )
        results["tasks"] = scores
        if not args.json:
            for name, score in scores.items():
                print(f"{name}: {_format_scores(score)}")
    if args.json:
        print(json.dumps(results))


def _evaluate_text(args: EvalArgs) -> dict[str, object]:
    for flag in ("encoding", "field", "kind", "raw_bin"):
        if getattr(args, flag) != getattr(EvalArgs, flag) and not args.data:
            raise UserError(f"--{flag} describes the text of --data: give both, or neither")
    from gptforge.builders.run_evaluation import DATA_OPTIONS, evaluate_run
    from gptforge.data.prepare.text_io import TextFormat

    text_format = TextFormat(args.field or TextFormat.field, args.encoding or TextFormat.encoding)
    options = replace(DATA_OPTIONS, text_format=text_format, kind=args.kind, raw_bin=args.raw_bin)
    score = evaluate_run(args.run, data=args.data, data_options=options, device=args.device)
    if not math.isfinite(score.loss):
        hint = "the training of this model diverged, or its weights are too large for this device"
        raise RunError(f"{args.run}: loss is NaN or Inf: {hint}")
    if not args.json:
        what = f"loss on {args.data}" if args.data else "held-out loss"
        values = score.loss, score.bits_per_byte, score.nats_per_char, score.num_tokens
        safe_print(f"{what} {format_val_loss(*values)}")
    return {
        "loss": score.loss,
        "perplexity": math.exp(min(score.loss, 700.0)),
        "bits_per_byte": score.bits_per_byte,
        "nats_per_char": score.nats_per_char,
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
        "characters": score.num_chars,
    }


def _format_scores(scores: Mapping[str, float]) -> str:
    """A task's metrics in one line, under the names of lm-evaluation-harness."""
    parts = []
    for name, value in scores.items():
        if name == "questions" or name.endswith("_stderr"):
            continue
        spec = ".2%" if name.startswith("acc") else ".2f" if "perplexity" in name else ".4f"
        stderr = scores.get(f"{name}_stderr")
        error = "" if stderr is None else f" ± {stderr:{spec}}"
        parts.append(f"{name} {value:{spec}}{error}")
    count = f", of {scores['questions']:,} examples" if "questions" in scores else ""
    return ", ".join(parts) + count
