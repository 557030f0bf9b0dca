"""`gptforge bench`: how fast this machine trains a configuration, beside others if asked."""

import dataclasses
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptforge.cli.flags import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import UserError
from gptforge.printable import print_stderr, safe_print

if TYPE_CHECKING:
    import torch

    from gptforge.train.train_step import TrainStep


VOCABULARIES = {"gpt2": 50304, "char": 128, "byte": 320}
"""Rows of the token table where none are asked for: there is no text to count them in."""
TOKENS = {"gpt2": 50257}
"""Rows of the table that have a token, where it is known beforehand."""
MFU = "MFU = tokens/s x (6 N + 12 L C T) / peak"
BEGUN = time.perf_counter()


@dataclass(frozen=True)
class BenchConfig(Config):
    """Measure how fast this machine trains: takes all flags of training, and these."""

    peer: Literal["", "hf", "plain"] = ""
    """Time this too, in turns: hf is transformers' GPT-2, plain a plain training loop."""
    repeats: int = 5
    """Times each is timed, for a second or more; medians are printed."""
    profile: str = ""
    """Folder for a trace of one update; prints where its time goes."""
    generate: bool = False
    """Measure writing instead of training: prompts of 32 tokens, 128 new ones."""
    json: bool = False
    """Print one JSON object on standard output, and the rest on standard error."""


def bench(args: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parsed, given = parse_train_args(args, cls=BenchConfig, prog="gptforge bench")
    assert isinstance(parsed, BenchConfig)
    if parsed.repeats < 1:
        raise UserError(f"--turns must be 1 or more, not {parsed.repeats}")
    if parsed.generate and (parsed.peer == "plain" or parsed.profile):
        raise UserError("--generate writes: it goes with --peer hf, not with plain or --profile")
    if parsed.profile:
        # Before minutes of measuring, not after.
        try:
            Path(parsed.profile).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--profile {parsed.profile}: no folder can be made there ({error.strerror})"
            ) from None
    prewarm_cuda(parsed.device)
    say = print_stderr if parsed.json else safe_print
    names = [field.name for field in dataclasses.fields(Config)]
    config = resolve_preset(Config(**{n: getattr(parsed, n) for n in names}), given, log=say)
    if not config.vocab_size:
        rows = VOCABULARIES.get(config.tokenizer, VOCABULARIES["gpt2"])
        config = dataclasses.replace(config, vocab_size=rows)
    measure = _writing if parsed.generate else _training
    found = measure(config, given, parsed, say)
    if parsed.json:
        print(json.dumps(found))
    return 0


def _training(
    config: Config, given: Collection[str], asked: BenchConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    from gptforge.bench.baselines import build_baseline, describe_baseline
    from gptforge.bench.train_speed import (
        StepFn,
        profile,
        random_batch,
        summarize,
        time_interleaved,
    )
    from gptforge.builders.step_timing import build_bench_step
    from gptforge.report.format import format_count

    step = build_bench_step(config, given, say)
    batch = random_batch(config, step.device)

    def update(inputs: "torch.Tensor", targets: "torch.Tensor") -> object:
        return step(inputs, targets, lr=config.max_lr)

    update(*batch)
    ready = time.perf_counter() - BEGUN
    makers: dict[str, Callable[[], StepFn]] = {"gptforge": lambda: update}
    if asked.peer:

        def make_peer() -> StepFn:
            peer = build_baseline(asked.peer, step.model, config, step.precision)
            return lambda inputs, targets: peer(inputs, targets, lr=config.max_lr)

        say(f"beside it: {describe_baseline(asked.peer, step.device, step.precision)}")
        makers[asked.peer] = make_peer
    speeds = time_interleaved(makers, batch, repeats=asked.repeats, device=step.device)
    figures = [summarize(speed, speeds[0], config, step.device) for speed in speeds]
    figures[0]["first_step_seconds"] = ready
    found: dict[str, Any] = {"machine": _machine(step, config), "formula": MFU, "results": figures}
    say("")
    say(
        "| who | tokens/s | ms a step (from, to) | TFLOP/s | MFU | first step, s | peak GB "
        "| ours to it |"
    )
    say("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for figure in figures:
        say(_row(figure))
    per_token = figures[0]["flops_per_token"]
    peak = figures[0]["peak_tflops_per_second"]
    of = f"peak {peak:,.0f} TFLOP/s" if peak else "peak not known here, so none is given"
    say(f"\n{MFU}, here {format_count(per_token)}FLOP a token; {of}")
    if asked.profile:
        seen = profile(update, batch, Path(asked.profile))
        found["profile"] = seen
        total = sum(ms for _, ms, _ in seen)
        say("\n| what | ms | calls | share of these |\n| --- | --- | --- | --- |")
        for name, ms, calls in seen:
            say(f"| {name[:80]} | {ms:.2f} | {calls:.0f} | {ms / total:.1%} |")
        say(f"\nthe whole of it: {(Path(asked.profile) / 'trace.json').as_posix()}")
    return found


def _writing(
    config: Config, given: Collection[str], asked: BenchConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    import torch

    from gptforge.bench.generate_speed import (
        NEW_TOKENS,
        PROMPT_TOKENS,
        gptforge_generator,
        time_generation,
        transformers_generator,
    )
    from gptforge.builders.load_model import inference_dtype
    from gptforge.builders.step_timing import build_random_model
    from gptforge.inference.generate import TokenGenerator
    from gptforge.inference.model import InferenceModel

    prompt = min(PROMPT_TOKENS, config.block_size // 2)
    new_tokens = min(NEW_TOKENS, config.block_size - prompt)
    if not prompt:
        raise UserError("--generate needs a --block_size of 2 or more")
    model = build_random_model(config, say)
    device = next(model.parameters()).device
    size = min(model.config.vocab_size, TOKENS.get(config.tokenizer, model.config.vocab_size))
    dtype = inference_dtype(config.dtype, device, model.config)
    decoder = TokenGenerator(
        InferenceModel(model, vocab_size=size, dtype=dtype, frozen=True), cuda_graph=True
    )
    writers = {f"gptforge, {_plain(dtype)}": gptforge_generator(decoder)}
    if asked.peer:
        # As transformers loads a GPT-2, and in the type that ours writes in.
        for kind in dict.fromkeys((torch.float32, dtype)):
            writers[f"hf, {_plain(kind)}"] = transformers_generator(model, kind)
    say(f"\n{prompt} tokens of prompt, {new_tokens} new ones, temperature 0.8, top-k 200\n")
    say("| who | batch | new tokens/s (from, to) | ms to the first | ours to it |")
    say("| --- | --- | --- | --- | --- |")
    figures = []
    for batch in (1, 256) if device.type == "cuda" else (1, 8):
        speeds = time_generation(
            writers,
            batch=batch,
            vocab_size=size,
            prompt_tokens=prompt,
            new_tokens=new_tokens,
            repeats=asked.repeats,
            device=device,
        )
        for speed in speeds:
            f = speed.summarize(speeds[0])
            figures.append(f)
            first = f"{f['ms_to_first']:.1f}" if f["ms_to_first"] else ""
            say(
                f"| {f['who']} | {batch} | {f['tokens_per_second']:,.0f} "
                f"({f['tokens_per_second_from']:,.0f}, {f['tokens_per_second_to']:,.0f}) | {first} "
                f"| {f['ours_is_faster_by']:.2f} x |"
            )
    graph = "CUDA graph" if decoder.has_cuda_graph else "no CUDA graph"
    say(f"\nsteps of ours: {graph}")
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda_graph": decoder.has_cuda_graph,
    }
    return {"machine": machine, "results": figures}


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _machine(step: "TrainStep", config: Config) -> dict[str, Any]:
    import torch

    from gptforge.builders.train_step import attention_backend

    is_gpu = step.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(step.device) if is_gpu else str(step.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": step.precision.name,
        "way": step.backend_name,
        "compiled": step.is_compiled,
        "attention": attention_backend(step, config),
        "micro_batch": step.micro_batch_size,
        "tokens_per_step": config.tokens_per_step,
    }


def _row(f: dict[str, Any]) -> str:
    mfu = f"{f['mfu']:.1%}" if f["mfu"] else ""
    memory = f"{f['peak_memory_bytes'] / 1e9:.1f}" if f["peak_memory_bytes"] else ""
    return (
        f"| {f['who']} | {f['tokens_per_second']:,.0f} | {f['ms_a_step']:.1f} ({f['ms_from']:.1f}, "
        f"{f['ms_to']:.1f}) | {f['tflops_per_second']:.3g} | {mfu} | "
        f"{f['first_step_seconds']:.1f} | {memory} | {f['ours_is_faster_by']:.2f} x |"
    )
