"""How long training waits for its batches.

    python benchmarks/loader_wait.py shards                              GPT-2 small on a GPU
    python benchmarks/loader_wait.py input.txt --preset debug --device cpu      to see that it works

Steps with the data loader, interleaved with steps over one fixed batch. It prints the share of the
time that the loader's calls take, and how much longer a step is with the loader. As in training,
there is no synchronization between steps: what overlaps with the device costs nothing.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.device import synchronize
from gptforge.presets import PRESETS, get_preset
from gptforge.report.log_handler import log_to
from gptforge.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="prepared data, or a text")
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="in a repeat")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            get_preset(args.preset),
            input=str(args.input),
            device=args.device,
            val_fraction=0.0,
            out_dir=str(Path(folder) / "run"),
        )
        with log_to(print):
            trainer = build_trainer(config, explicit=())
        assert isinstance(trainer, Trainer)
        step, loader = trainer.step_fn, trainer.dataloader
        fixed_batch = tuple(tensor.clone() for tensor in loader.next_batch())
        waits: list[float] = []

        def with_loader() -> None:
            start = time.perf_counter()
            batch = loader.next_batch()
            wait = time.perf_counter() - start
            step(*batch, lr=1e-4)
            start = time.perf_counter()
            loader.prefetch_to_device()
            waits.append(wait + time.perf_counter() - start)

        def without_loader() -> None:
            step(*fixed_batch, lr=1e-4)

        seconds: dict[str, list[float]] = {"fixed batch": [], "data loader": []}
        functions = {"fixed batch": without_loader, "data loader": with_loader}
        for repeat in range(args.repeats + 1):
            for label, function in functions.items():
                synchronize(step.device)
                start = time.perf_counter()
                for _ in range(args.steps):
                    function()
                synchronize(step.device)
                if repeat:  # the first is a warmup
                    seconds[label].append((time.perf_counter() - start) / args.steps)
        waits = waits[args.steps :]
        trainer.lock.release()
    tokens = config.tokens_per_step
    print(
        f"\n{args.preset} on {step.device}, torch {torch.__version__}: {tokens:,} tokens per step"
    )
    print("| steps over | ms (min, max) | tokens/s |")
    print("| --- | --- | --- |")
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    for label, times in seconds.items():
        span = f"({1e3 * min(times):.2f}, {1e3 * max(times):.2f})"
        print(f"| {label} | {1e3 * medians[label]:.2f} {span} | {tokens / medians[label]:,.0f} |")
    wait, overhead = statistics.mean(waits), medians["data loader"] / medians["fixed batch"] - 1
    print(
        f"\nwaiting for a batch takes {1e3 * wait:.2f} ms on average, {1e3 * max(waits):.2f} at "
        f"most: {wait / medians['data loader']:.2%} of a step; a step is {overhead:+.2%} longer "
        "with the loader"
    )


if __name__ == "__main__":
    main()
