"""`gptforge sample RUN`: generate text with a trained model; `gptforge demo RUN`: the web page.

Only generated text goes to stdout, so that it can be piped; notes go to stderr.
"""

import contextlib
import json
import sys
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.config import SEED_LIMIT
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import RunError, UserError
from gptforge.printable import print_stderr, terminal_safe
from gptforge.report.log_handler import log_to

if TYPE_CHECKING:
    from gptforge.inference.language_model import LanguageModel


MAX_BATCH_SIZE = 64


@dataclass(frozen=True)
class SampleArgs:
    """Generate text with a trained model: the prompt and its continuation go to stdout."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder or exported model."""
    prompt: str = ""
    """Text to continue, in which <|endoftext|> separates documents; empty: the beginning of a
    document, or of a line if the model was not trained on documents; -: standard input."""
    max_new_tokens: int = 300
    """Tokens to generate."""
    temperature: float = 0.8
    """Below 1: more predictable, above 1: more random; 0: greedy."""
    top_k: int = 200
    """Sample among the k most likely tokens; 0: among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens with this total probability."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this text; may be given several times."""
    seed: int = 1337
    """The same seed generates the same text."""
    num_samples: int = 1
    """Number of texts, with consecutive seeds."""
    interactive: bool = False
    """Read prompts line by line, and continue each."""
    json: bool = False
    """Print one JSON object per text: prompt, text, seed, ended, ids and their logprobs."""
    dtype: str = "auto"
    """Compute dtype: auto, float32, bfloat16 or float16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True)
class DemoArgs:
    """Serve a web page to generate text with a trained model and to watch its training."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder, checkpoint folder or exported model."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: reachable from other machines."""
    port: int = 0
    """Port; 0: the first free one from 7860 on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    allowed_hosts: str = ""
    """Host names, separated by commas, under which others may reach the page; *: any."""


@log_to(print_stderr)
def main(argv: list[str]) -> None:
    """Load a model and generate."""
    args = parse_args(SampleArgs, argv, "gptforge sample")
    if args.num_samples < 1:
        raise UserError(f"--num_samples must be 1 or more, not {args.num_samples}")
    if args.interactive and (args.json or args.prompt or args.num_samples > 1):
        raise UserError("--interactive reads prompts from stdin: leave out the other flags")
    if not 0 <= args.seed < SEED_LIMIT:
        raise UserError(f"--seed must be 0 or more and below 2**63, not {args.seed}")
    prewarm_cuda(args.device)
    from gptforge.builders.load_model import limit_threads, load
    from gptforge.inference.sampling import SamplingParams
    from gptforge.inference.validation import (
        check_non_negative_int,
        normalize_prompt,
        prompt_from_argv,
    )

    SamplingParams(args.temperature, args.top_k, args.top_p).validate(prefix="--")
    check_non_negative_int(args.max_new_tokens, "--max_new_tokens")
    args = replace(args, stop=tuple(prompt_from_argv(text) for text in args.stop))
    model = load(args.run, device=args.device, dtype=args.dtype)
    limit_threads(model)
    if not model.logits([0]).isfinite().all():
        raise RunError(f"{args.run}: logits are NaN or Inf, since training diverged")
    if args.interactive:
        _interactive(model, args)
        return
    prompt = args.prompt
    prompt = normalize_prompt(sys.stdin.read()) if prompt == "-" else prompt_from_argv(prompt)
    if args.num_samples == 1 and not args.json:
        _stream(model, args, prompt, args.seed)
    else:
        _generate_batches(model, args, prompt)


def _stream(model: "LanguageModel", args: SampleArgs, prompt: str, seed: int) -> None:
    chunks = model.stream(
        prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=args.stop,
        seed=seed,
    )
    # Printed after `stream` has validated its arguments.
    notes: list[str] = []
    try:
        with log_to(notes.append):
            for chunk in chain([prompt], chunks):
                print(terminal_safe(chunk), end="", flush=True)
    finally:
        print(flush=True)
        for note in notes:
            print_stderr(note)


def _generate_batches(model: "LanguageModel", args: SampleArgs, prompt: str) -> None:
    from gptforge.inference.sampling import SamplingParams

    for first in range(0, args.num_samples, MAX_BATCH_SIZE):
        numbers = range(first, min(first + MAX_BATCH_SIZE, args.num_samples))
        seeds = [(args.seed + number) % SEED_LIMIT for number in numbers]
        completions = model.generate_batch(
            [prompt] * len(seeds),
            args.max_new_tokens,
            SamplingParams(args.temperature, args.top_k, args.top_p),
            stop=args.stop,
            seeds=seeds,
            logprobs=args.json,
        )
        for number, seed, completion in zip(numbers, seeds, completions, strict=True):
            if args.json:
                record = {
                    "prompt": prompt,
                    "text": completion.text,
                    "seed": seed,
                    "ended": completion.finish_reason,
                    "ids": completion.ids,
                    "logprobs": completion.logprobs,
                }
                print(json.dumps(record, ensure_ascii=sys.stdout.isatty()), flush=True)
            else:
                separator = "---\n" if number else ""
                print(terminal_safe(f"{separator}{prompt}{completion.text}"), flush=True)


def _interactive(model: "LanguageModel", args: SampleArgs) -> None:
    """Continue each line of stdin. Ctrl-C only ends the current completion."""
    from gptforge.inference.validation import normalize_prompt

    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Type a prompt; Ctrl-C stops generation, Ctrl-D quits.", file=sys.stderr)
    seed = args.seed
    while (line := _read_line(is_terminal=is_terminal)) is not None:
        try:
            _stream(model, args, normalize_prompt(line).rstrip("\r\n"), seed)
        except UserError as error:
            # For instance a character that the tokenizer does not know: ask for the next line.
            print_stderr(f"error: {error}")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
        seed = (seed + 1) % SEED_LIMIT


def _read_line(*, is_terminal: bool) -> str | None:
    if not is_terminal:
        return sys.stdin.readline() or None
    print(file=sys.stderr, flush=True)
    if not sys.stdout.isatty():
        # `input` would print the prompt sign to stdout, where only text belongs.
        print("> ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline() or None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` line editing and a history; not on Windows)
    try:
        return input("> ")
    except EOFError:
        print(file=sys.stderr)
        return None


def demo_main(argv: list[str]) -> None:
    """Serve until interrupted."""
    args = parse_args(DemoArgs, argv, "gptforge demo")
    if not 0 <= args.port < 65536:
        raise UserError(f"--port must be 0 to 65535, not {args.port}")
    from gptforge.demo.launch import launch

    names = [name for word in args.allowed_hosts.split(",") if (name := word.strip())]
    launch(args.run, host=args.host, port=args.port, device=args.device, allowed_hosts=names)
