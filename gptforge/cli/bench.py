"""`gptforge bench`: how fast this machine trains or generates, compared with other code."""

import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.cuda_prewarm import prewarm_cuda
from gptforge.errors import UserError, parsing
from gptforge.presets import AUTO, FINETUNE
from gptforge.printable import print_stderr, safe_print
from gptforge.report.format import format_count, markdown_table
from gptforge.report.log_handler import log_to

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


VOCAB_SIZES = {"gpt2": 50304, "char": 128, "byte": 320, "bpe": 1024}
"""Default --vocab_size, as there is no text to derive it from."""
NUM_TOKENS = {"gpt2": 50257}  # ids that stand for a token, where fewer than vocab_size
MFU_FORMULA = "MFU = tokens/s x (6 N + 12 L C T) / peak"
PROFILE_ROWS = 25
START_TIME = time.perf_counter()


@dataclass(frozen=True)
class BenchConfig(Config):
    """Measure how fast this machine trains. Takes all flags of train, and these."""

    peer: Literal["", "hf", "plain"] = ""
    """Baseline to compare with: hf is transformers' GPT-2, plain a plain training loop."""
    repeats: int = 5
    """Measurements of each implementation, alternating; medians are printed."""
    profile: str = ""
    """Folder for a profiler trace of one step; prints the slowest kernels."""
    generate: bool = False
    """Measure generation instead of training: prompts of 32 tokens, 128 new ones."""
    json: bool = False
    """Print one JSON object on stdout, and the rest on stderr."""


def main(argv: list[str]) -> None:
    """Measure and print."""
    args, explicit = parse_train_args(argv, cls=BenchConfig, prog="gptforge bench")
    if args.repeats < 1:
        raise UserError(f"--repeats must be 1 or more, not {args.repeats}")
    if args.generate and (args.peer == "plain" or args.profile):
        raise UserError("--generate can be compared with --peer hf only, and has no --profile")
    if args.profile:
        # Checked before the measurement, which takes minutes.
        with parsing(f"--profile {args.profile}", "a folder that can be created"):
            Path(args.profile).mkdir(parents=True, exist_ok=True)
    prewarm_cuda(args.device)
    measure = _measure_generation if args.generate else _measure_training
    with log_to(print_stderr if args.json else safe_print):
        config = resolve_preset(args, explicit)
        if config.preset in (AUTO, FINETUNE):
            raise UserError(
                f"--preset {config.preset} fits a text, and none is read here: name another preset"
            )
        if not config.vocab_size:
            vocab_size = VOCAB_SIZES.get(config.tokenizer, VOCAB_SIZES["gpt2"])
            config = dataclasses.replace(config, vocab_size=vocab_size)
        results = measure(config, explicit, args)
    if args.json:
        print(json.dumps(results))


def _measure_training(
    config: Config, explicit: Collection[str], args: BenchConfig
) -> dict[str, Any]:
    from gptforge.bench.baselines import build_baseline, describe_baseline
    from gptforge.bench.train_speed import StepFn, profile, random_batch, time_training
    from gptforge.builders.build_train_step import attention_backend
    from gptforge.builders.step_timing import build_bench_step

    step = build_bench_step(config, explicit)
    batch = random_batch(config, step.device)
    step_fn = functools.partial(step, lr=config.max_lr)
    step_fn(*batch)
    first_step_seconds = time.perf_counter() - START_TIME
    factories: dict[str, Callable[[], StepFn]] = {"gptforge": lambda: step_fn}
    if args.peer:
        logger.info(f"baseline: {describe_baseline(args.peer, step.device, step.precision)}")
        factories[args.peer] = lambda: functools.partial(
            build_baseline(args.peer, step.model, config, step.precision), lr=config.max_lr
        )
    results = time_training(factories, batch, config, repeats=args.repeats)
    results[0]["first_step_seconds"] = first_step_seconds
    logger.info(
        "\n| implementation | tokens/s | ms per step (min, max) | TFLOP/s | MFU | first step, s "
        "| peak GB | gptforge's speedup |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for r in results:
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else ""
        memory = f"{r['peak_memory_bytes'] / 1e9:.1f}" if r["peak_memory_bytes"] else ""
        logger.info(
            f"| {r['implementation']} | {r['tokens_per_second']:,.0f} "
            f"| {r['ms_per_step']:.1f} ({r['ms_min']:.1f}, {r['ms_max']:.1f}) "
            f"| {r['tflops_per_second']:.3g} | {mfu} | {r['first_step_seconds']:.1f} | {memory} "
            f"| {r['gptforge_speedup']:.2f} x |"
        )
    peak = results[0]["peak_tflops_per_second"]
    note = f"16-bit peak {peak:,.0f} TFLOP/s" if peak else "peak is unknown, so MFU is not given"
    per_token = format_count(results[0]["flops_per_token"])
    logger.info(f"\n{MFU_FORMULA}, here {per_token}FLOP per token; {note}")
    if args.peer:
        logger.info("first step: since the program started; of the baseline, since it was built")
    machine = {
        **_device_facts(step.device),
        "dtype": step.precision.name,
        "backend": step.backend_name,
        "compiled": step.is_compiled,
        "attention": attention_backend(step, config),
        "micro_batch": step.micro_batch_size,
        "tokens_per_step": config.tokens_per_step,
    }
    found: dict[str, Any] = {"machine": machine, "formula": MFU_FORMULA, "results": results}
    if args.profile:
        kernels = profile(step_fn, batch, Path(args.profile))
        total = sum(ms for _, ms, _ in kernels)  # of the step, not of the rows that are shown
        found["profile"] = kernels = kernels[:PROFILE_ROWS]
        rows = [
            (name[:80], f"{ms:.2f}", f"{calls:.0f}", f"{ms / total:.1%}")
            for name, ms, calls in kernels
        ]
        logger.info(f"\n{markdown_table([('kernel', 'ms', 'calls', 'share'), *rows])}")
        logger.info(f"\nfull trace: {(Path(args.profile) / 'trace.json').as_posix()}")
    return found


def _measure_generation(
    config: Config, explicit: Collection[str], args: BenchConfig
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

    prompt_tokens = min(PROMPT_TOKENS, config.block_size // 2)
    new_tokens = min(NEW_TOKENS, config.block_size - prompt_tokens)
    if not prompt_tokens:
        raise UserError("--generate needs a --block_size of 2 or more")
    model = build_random_model(config)
    device = next(model.parameters()).device
    vocab_size = model.config.vocab_size
    num_tokens = min(vocab_size, NUM_TOKENS.get(config.tokenizer, vocab_size))
    dtype = inference_dtype(config.dtype, device, model.config)
    generator = TokenGenerator(
        InferenceModel(model, vocab_size=num_tokens, dtype=dtype, frozen=True), cuda_graph=True
    )
    generators = {f"gptforge, {dtype}": gptforge_generator(generator)}
    if args.peer:
        # In float32, as transformers loads a GPT-2, and in the dtype used above.
        for hf_dtype in dict.fromkeys((torch.float32, dtype)):
            generators[f"hf, {hf_dtype}"] = transformers_generator(model, hf_dtype)
    generators = {name.replace("torch.", ""): fn for name, fn in generators.items()}
    logger.info(
        f"\n{prompt_tokens} prompt tokens, {new_tokens} new ones, temperature 0.8, top-k 200\n\n"
        "| implementation | batch | new tokens/s (min, max) | ms to first token "
        "| gptforge's speedup |\n"
        "| --- | --- | --- | --- | --- |"
    )
    results = []
    for batch in (1, 256) if device.type == "cuda" else (1, 8):
        for r in time_generation(
            generators,
            batch=batch,
            vocab_size=num_tokens,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=args.repeats,
            device=device,
        ):
            results.append(r)
            first = f"{r['ms_to_first']:.1f}" if r["ms_to_first"] else ""
            logger.info(
                f"| {r['implementation']} | {r['batch']} | {r['tokens_per_second']:,.0f} "
                f"({r['tokens_per_second_min']:,.0f}, {r['tokens_per_second_max']:,.0f}) "
                f"| {first} | {r['gptforge_speedup']:.2f} x |"
            )
    graph = "CUDA graph" if generator.has_cuda_graph else "no CUDA graph"
    logger.info(f"\ngptforge's decode steps: {graph}")
    machine = {**_device_facts(device), "cuda_graph": generator.has_cuda_graph}
    return {"machine": machine, "results": results}


def _device_facts(device: "torch.device") -> dict[str, Any]:
    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
