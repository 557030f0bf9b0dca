"""`gptforge eval RUN`: judge a trained model, by held-out text or by questions."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gptforge.cli.flags import parse_args
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError
from gptforge.printable import safe_print


@dataclass(frozen=True)
class EvalArgs:
    """Judge a trained model: loss, perplexity and bits per byte on text it has not learned."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder, or a model that `export --to hf` or transformers wrote."""
    data: str = ""
    """Text to judge by, all of it, or token shards, by what they hold out; empty: the part that the
    run held out."""
    encoding: str = ""
    """Of the text of --data, for instance latin-1; empty: utf-8."""
    field: str = ""
    """Field of a JSON line, or column, that holds the text of --data; empty: text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """What --data holds; auto goes by its name."""
    tasks: str = ""
    """hellaswag, lambada or both: questions to be answered instead, or as well as --data. They come
    from the Hugging Face Hub; NAME=FILE.jsonl reads them from a file. Other names are tasks of
    lm-evaluation-harness, where the package lm_eval is installed."""
    include_path: str = ""
    """Folder with more tasks for lm-evaluation-harness, in its own form."""
    limit: int = 0
    """Ask the first so many questions of each task; 0: all."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def evaluate(args: list[str]) -> int:
    """`gptforge eval RUN`: judge a trained model by held-out text."""
    asked = parse_args(EvalArgs, args, "gptforge eval")
    prewarm_cuda(asked.device)
    facts: dict[str, object] = {}
    if not asked.tasks or asked.data:
        facts |= _judge_by_text(asked)
    if asked.tasks:
        from gptforge.builders.evaluate import evaluate_tasks

        scores = evaluate_tasks(
            asked.run,
            asked.tasks,
            limit=asked.limit,
            device=asked.device,
            include_path=asked.include_path,
        )
        facts["tasks"] = scores
        if not asked.json:
            for name, score in scores.items():
                print(f"{name}: {_in_words(score)}")
    if asked.json:
        print(json.dumps(facts))
    return 0


def _judge_by_text(asked: EvalArgs) -> dict[str, object]:
    from gptforge.builders import evaluate_run

    what = f"loss on {asked.data}" if asked.data else "held-out loss"
    score = evaluate_run(
        asked.run,
        data=asked.data,
        encoding=asked.encoding,
        field=asked.field,
        kind=asked.kind,
        device=asked.device,
    )
    if not math.isfinite(score.loss):
        raise RunError(
            f"{asked.run}: its loss is no number: the training of this model broke down, or its "
            "weights are too large for this device"
        )
    if not asked.json:
        safe_print(
            f"{what} {score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, "
            f"{score.bits_per_byte:.4f} bits per byte, over {score.num_tokens:,} tokens"
        )
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
    }


def _in_words(score: Mapping[str, float]) -> str:
    """A task's scores in a line, as the harness names them."""
    words = []
    for name, value in score.items():
        if name == "questions" or name.endswith("_stderr"):
            continue
        form = ".2%" if name.startswith("acc") else ".2f" if "perplexity" in name else ".4f"
        error = score.get(f"{name}_stderr")
        words.append(f"{name} {value:{form}}" + (f" ± {error:{form}}" if error is not None else ""))
    count = f", of {score['questions']:,} questions" if "questions" in score else ""
    return ", ".join(words) + count
