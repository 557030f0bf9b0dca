"""`gptforge sample RUN`: write with a trained model.

Text goes to standard output and nothing else does, so that a pipe gets only that; notes and the
prompt sign of `--interactive` go to standard error.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.flags import parse_args
from gptforge.config import SEED_LIMIT
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError, UserError
from gptforge.printable import print_stderr, terminal_safe

if TYPE_CHECKING:
    from gptforge.inference.language_model import LanguageModel
    from gptforge.inference.sampling import SamplingParams


AT_ONCE = 64
"""Samples written as one batch."""


@dataclass(frozen=True)
class SampleArgs:
    """Write with a trained model: the prompt and its continuation go to standard output."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder or exported model."""
    prompt: str = ""
    """Text to go on from, in which <|endoftext|> is the mark between documents; empty: a document's
    beginning, or a line's if the model was not trained on documents; -: standard input."""
    max_new_tokens: int = 300
    """Tokens to write."""
    temperature: float = 0.8
    """Below 1 tamer, above 1 wilder; 0: always the likeliest token."""
    top_k: int = 200
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this much probability."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End before this text; may be given several times."""
    seed: int = 1337
    """The same seed writes the same text."""
    num_samples: int = 1
    """Texts to write, with seeds that follow each other."""
    interactive: bool = False
    """Go on from one line after another, as you type them."""
    json: bool = False
    """Print a JSON object a text: prompt, text, seed, ended, ids and their log probabilities."""
    dtype: str = "auto"
    """Type to compute in: auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def sample(args: list[str]) -> int:
    """Parse, load, write; returns the exit code."""
    asked = parse_args(SampleArgs, args, "gptforge sample")
    if asked.num_samples < 1:
        raise UserError(f"--num_samples must be 1 or more, not {asked.num_samples}")
    if asked.interactive and (asked.json or asked.prompt or asked.num_samples > 1):
        raise UserError("--interactive takes its prompts from you, one at a time, and prints text")
    if not 0 <= asked.seed < SEED_LIMIT:
        raise UserError(f"--seed must be 0 or more and below 2**63, not {asked.seed}")
    prewarm_cuda(asked.device)
    from gptforge.builders.load_model import limit_threads, load
    from gptforge.inference.sampling import SamplingParams
    from gptforge.inference.validation import normalize_prompt, prompt_from_argv

    asked = replace(asked, stop=tuple(prompt_from_argv(text) for text in asked.stop))
    writer = load(asked.run, device=asked.device, dtype=asked.dtype)
    limit_threads(writer)
    if not writer.logits([0]).isfinite().all():
        raise RunError(
            f"{asked.run} writes nothing: its weights are no use, for training broke down"
        )
    sampling = SamplingParams(asked.temperature, asked.top_k, asked.top_p)
    if asked.interactive:
        return _interactive(writer, asked)
    prompt = asked.prompt
    prompt = normalize_prompt(sys.stdin.read()) if prompt == "-" else prompt_from_argv(prompt)
    if asked.num_samples == 1 and not asked.json:
        _stream(writer, asked, prompt, asked.seed)
    else:
        _batches(writer, asked, prompt, sampling)
    return 0


def _stream(writer: "LanguageModel", asked: SampleArgs, prompt: str, seed: int) -> None:
    pieces = writer.stream(
        prompt,
        asked.max_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        stop=asked.stop,
        seed=seed,
    )
    # Only now: what is wrong with the settings or the prompt has been said.
    print(terminal_safe(prompt), end="", flush=True)
    for piece in pieces:
        print(terminal_safe(piece), end="", flush=True)
    print(flush=True)


def _batches(
    writer: "LanguageModel", asked: SampleArgs, prompt: str, sampling: "SamplingParams"
) -> None:
    for first in range(0, asked.num_samples, AT_ONCE):
        numbers = range(first, min(first + AT_ONCE, asked.num_samples))
        some = [(asked.seed + number) % SEED_LIMIT for number in numbers]
        writings = writer.generate_batch(
            [prompt] * len(some),
            asked.max_new_tokens,
            sampling,
            stop=asked.stop,
            seeds=some,
            logprobs=asked.json,
        )
        for number, seed, writing in zip(numbers, some, writings, strict=True):
            if asked.json:
                record = {"prompt": prompt, "text": writing.text, "seed": seed}
                record |= {
                    "ended": writing.finish_reason,
                    "ids": writing.ids,
                    "logprobs": writing.logprobs,
                }
                print(json.dumps(record, ensure_ascii=sys.stdout.isatty()), flush=True)
            else:
                rule = "---\n" if number else ""
                print(terminal_safe(f"{rule}{prompt}{writing.text}"), flush=True)


def _interactive(writer: "LanguageModel", asked: SampleArgs) -> int:
    """A line in, its continuation out, until the input ends. Ctrl-C ends only the writing."""
    from gptforge.inference.validation import normalize_prompt

    is_watched = sys.stdin.isatty()
    if is_watched:
        print("Type a beginning; Ctrl-C stops the writing, Ctrl-D leaves.", file=sys.stderr)
    seed = asked.seed
    while True:
        if is_watched:
            print("\n> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        try:
            _stream(writer, asked, normalize_prompt(line).rstrip("\r\n"), seed)
        except UserError as error:
            # A stray character should not end the conversation.
            print_stderr(f"error: {error}")
        except KeyboardInterrupt:
            if not is_watched:
                raise
            print(flush=True)
        seed = (seed + 1) % SEED_LIMIT
