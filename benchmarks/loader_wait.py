"""How long training waits for its batches, beside a real device.

    python benchmarks/loader_wait.py shards                              GPT-2 small on a GPU
    python benchmarks/loader_wait.py input.txt --preset debug --device cpu      to see that it works

Updates over batches that the loader reads from disk, in turns with updates over one batch that is
already there. Two figures: the share of the time that the program spends asking for a batch, and
how much longer an update takes than without a loader. Nothing is waited for within a turn, as in
training: what is asked for while the device computes costs nothing.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptforge.builders.trainer import build_trainer
from gptforge.device import synchronize
from gptforge.presets import PRESETS, get_preset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="prepared data, or a text")
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="updates in a turn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            get_preset(args.preset),
            input=str(args.input),
            device=args.device,
            val_fraction=0.0,
            out_dir=str(Path(folder) / "run"),
        )
        trainer = build_trainer(config, explicit=(), log=print)
        assert trainer is not None
        step, loader = trainer.step_fn, trainer.dataloader
        fixed = tuple(part.clone() for part in loader.next_batch())
        waits: list[float] = []

        def with_loader() -> None:
            begin = time.perf_counter()
            batch = loader.next_batch()
            asked = time.perf_counter() - begin
            step(*batch, lr=1e-4)
            begin = time.perf_counter()
            loader.prefetch_to_device()
            waits.append(asked + time.perf_counter() - begin)

        def without() -> None:
            step(*fixed, lr=1e-4)

        seconds: dict[str, list[float]] = {"with": [], "without": []}
        ways = {"with": with_loader, "without": without}
        for turn in range(args.turns + 1):
            for label, one in ways.items():
                synchronize(step.device)
                begin = time.perf_counter()
                for _ in range(args.steps):
                    one()
                synchronize(step.device)
                if turn:  # the first warms up
                    seconds[label].append((time.perf_counter() - begin) / args.steps)
        waited = waits[args.steps :]
        trainer.lock.release()
    usual, with_it = (statistics.median(seconds[label]) for label in ("without", "with"))
    tokens = config.tokens_per_step
    print(f"\n{args.preset} on {step.device}, torch {torch.__version__}: {tokens:,} tokens a step")
    print("| updates | ms (from, to) | tokens/s |")
    print("| --- | --- | --- |")
    for label, name in (("without", "over one batch that is there"), ("with", "with the loader")):
        own = [1e3 * s for s in seconds[label]]
        rate = tokens / statistics.median(seconds[label])
        middle = statistics.median(own)
        print(f"| {name} | {middle:.2f} ({min(own):.2f}, {max(own):.2f}) | {rate:,.0f} |")
    print(
        f"\nasking for a batch takes {1e3 * statistics.mean(waited):.2f} ms on average, "
        f"{1e3 * max(waited):.2f} at most: {statistics.mean(waited) / with_it:.2%} of an update's "
        f"time; an update takes {with_it / usual - 1:+.2%} longer than without a loader"
    )


if __name__ == "__main__":
    main()
