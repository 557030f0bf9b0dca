"""`gptforge bench`: how fast this machine trains a configuration, beside others if asked."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.flags import parse_train, with_preset

if TYPE_CHECKING:
    import torch

    from gptforge.train.step import TrainStep

VOCABULARIES = {"gpt2": 50304, "char": 128, "byte": 320}
"""Rows of the token table where none are asked for: there is no text to count them in."""
MFU = "MFU = tokens/s x (6 N + 12 L C T) / peak"
BEGUN = time.perf_counter()


@dataclass(frozen=True)
class BenchConfig(Config):
    """Measure how fast this machine trains: takes all flags of training, and these."""

    peer: Literal["", "hf", "plain"] = ""
    """Train this too, in turns: hf is transformers' GPT-2, plain a plain loop."""
    turns: int = 5
    """Times each is timed, for a second or more; medians are printed."""
    profile: str = ""
    """Folder for a trace of one update; prints where its time goes."""
    generate: bool = False
    """Measure writing instead of training."""
    json: bool = False
    """Print one JSON object on standard output, and the rest on standard error."""


def bench(args: list[str]) -> int:
    """Measure and print; returns the exit code."""
    parsed, given = parse_train(args, kind=BenchConfig)
    assert isinstance(parsed, BenchConfig)
    if parsed.turns < 1:
        raise UserError(f"--turns must be 1 or more, not {parsed.turns}")
    if parsed.peer and parsed.generate:
        raise UserError("--peer trains beside ours: leave --generate out")
    say = _quietly if parsed.json else print
    names = [field.name for field in dataclasses.fields(Config)]
    config = with_preset(Config(**{n: getattr(parsed, n) for n in names}), given, say=say)
    if not config.vocab_size:
        rows = VOCABULARIES.get(config.tokenizer, VOCABULARIES["gpt2"])
        config = dataclasses.replace(config, vocab_size=rows)
    from gptforge.build.benchmark import build_step

    step = build_step(config, given, say)
    found = _writing(step, say) if parsed.generate else _training(step, config, parsed, say)
    if parsed.json:
        print(json.dumps(found))
    return 0


def _training(
    step: "TrainStep", config: Config, asked: BenchConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    from gptforge.bench.peers import PEERS, build_peer
    from gptforge.bench.training import Update, facts, profile, random_batch, time_in_turns

    batch = random_batch(config, step.device)

    def update(inputs: "torch.Tensor", targets: "torch.Tensor") -> object:
        return step(inputs, targets, lr=config.max_lr)

    update(*batch)
    ready = time.perf_counter() - BEGUN
    makers: dict[str, Callable[[], Update]] = {"gptforge": lambda: update}
    if asked.peer:

        def make_peer() -> Update:
            peer = build_peer(asked.peer, step.model, config, step.precision)
            return lambda inputs, targets: peer(inputs, targets, lr=config.max_lr)

        say(f"beside it: {PEERS[asked.peer]}")
        makers[asked.peer] = make_peer
    speeds = time_in_turns(makers, batch, turns=asked.turns, device=step.device)
    figures = [facts(speed, speeds[0], config, step.device) for speed in speeds]
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
    say(f"\n{MFU}, here {per_token / 1e6:,.0f} MFLOP a token; {of}")
    if asked.profile:
        seen = profile(update, batch, Path(asked.profile))
        found["profile"] = seen
        total = sum(ms for _, ms, _ in seen)
        say("\n| what | ms | calls | share of these |\n| --- | --- | --- | --- |")
        for name, ms, calls in seen:
            say(f"| {name[:80]} | {ms:.2f} | {calls:.0f} | {ms / total:.1%} |")
        say(f"\nthe whole of it: {(Path(asked.profile) / 'trace.json').as_posix()}")
    return found


def _writing(step: "TrainStep", say: Callable[[str], None]) -> dict[str, Any]:
    from gptforge.generate.decode import Decoder
    from gptforge.generate.engine import Engine
    from gptforge.generate.speed import measure_writing

    is_gpu = step.device.type == "cuda"
    size = min(step.model.config.vocab_size, 50257)
    engine = Engine(step.model.eval(), size=size, dtype=step.precision.dtype)
    decoder = Decoder(engine, captured=True)
    say("\n| batch | new tokens/s | ms to the first | CUDA graph |\n| --- | --- | --- | --- |")
    figures = []
    for batch in (1, 256) if is_gpu else (1, 8):
        speed = measure_writing(decoder, batch=batch)
        figures.append(dataclasses.asdict(speed))
        graph = "yes" if speed.is_captured else "no"
        say(f"| {batch} | {speed.tokens_per_second:,.0f} | {speed.ms_to_first:.1f} | {graph} |")
    return {"machine": {"device": str(step.device)}, "results": figures}


def _machine(step: "TrainStep", config: Config) -> dict[str, Any]:
    import torch

    from gptforge.build.step import attention_of

    is_gpu = step.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(step.device) if is_gpu else str(step.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": step.precision.name,
        "way": step.way,
        "compiled": step.is_compiled,
        "attention": attention_of(step, config),
        "micro_batch": step.micro_batch,
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


def _quietly(text: str) -> None:
    import sys

    print(text, file=sys.stderr)
