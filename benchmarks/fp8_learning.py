"""Held-out loss of GPT-2 small after training in bfloat16, and in variants of fp8.

    gptforge prepare text.txt --out data/text
    python benchmarks/fp8_learning.py data/text --seeds 1 2 3 --out results
    python benchmarks/fp8_learning.py data/text --steps 3000 --sequences 32 --eval_every 500 \\
        --variants "bf16;fp8, after the warmup" --out results

Steps of 131,072 tokens, or of fewer `--sequences`. All runs read the same batches; a seed changes
the initial weights. `--variants` selects some, with semicolons; in those that end in "after the
warmup", the steps of the learning rate's warmup are in bfloat16, as with `--dtype fp8`. The
held-out loss is evaluated in bfloat16, on up to 2 million tokens, and divided by that of bf16 with
the same seed. The time of a step is that of the steps after the warmup.

Each run adds a line to fp8-learning.jsonl, and the table comes last. `--layers`, `--width`,
`--length`, `--sequences` and `--micro_batch` make it small enough for a CPU, where torch's
operations take the place of the kernels.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from fp8 import GPT2, MICRO_BATCH, SEQUENCES, VARIANTS, build_variant, using_variant

from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.data.token_dataset import ShardDataset, read_shard_header
from gptforge.device import select_device, synchronize
from gptforge.model import GPT
from gptforge.optim.schedule import learning_rate

VAL_TOKENS, MEAN_OVER, UNTIMED_STEPS = 2_000_000, 50, 5
AFTER_WARMUP = ", after the warmup"
LATE = tuple(name + AFTER_WARMUP for name in ("fp8", "fp8, gradients of all but c_fc in E4M3"))
DEVICE, DEVICE_NAME = select_device("auto")


def read_split(folder: Path, split: str) -> ShardDataset:
    paths = sorted(folder.glob(f"{split}_*.bin"))
    return ShardDataset([read_shard_header(p) for p in paths], vocab_size=GPT2.vocab_size)


@torch.no_grad()
def val_loss(model: GPT, val: ShardDataset) -> float:
    length = model.config.block_size
    count = min(VAL_TOKENS, len(val) - 1) // length
    tokens = torch.tensor(val[: count * length + 1].astype("int64"), device=DEVICE)
    x, y = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pairs = zip(x.split(16), y.split(16), strict=True)
        return float(torch.stack([model(a, b) for a, b in pairs]).sum()) / y.numel()


def train(name: str, seed: int, shape: GPTConfig, args: argparse.Namespace) -> dict[str, Any]:
    loader = DataLoader(
        read_split(args.data, "train"), context_length=shape.block_size,
        global_batch_size=args.sequences, seed=7, shuffle=True, device=DEVICE,
    )  # fmt: skip
    val = read_split(args.data, "val")
    config = Config(
        max_lr=args.max_lr, min_lr=args.max_lr / 10, warmup_steps=args.warmup_steps,
        max_steps=args.steps,
    )  # fmt: skip
    variant = name.removesuffix(AFTER_WARMUP)
    first_timed = min(args.warmup_steps + UNTIMED_STEPS, args.steps - 1)
    losses, norms, val_losses, seconds = [], [], {}, 0.0
    with using_variant(variant):
        step = build_variant(
            variant, seed, shape=shape, micro_batch=args.micro_batch, device=DEVICE
        )
        float8 = step.kernels.float8
        for number in range(args.steps):
            if name != variant and number in (0, args.warmup_steps):
                float8 = number == args.warmup_steps
                step.set_kernels(dataclasses.replace(step.kernels, float8=float8))
            if number == first_timed:
                synchronize(DEVICE)
                start = time.perf_counter()
            loss, norm = step(*loader.next_batch(), lr=learning_rate(config, number))
            losses.append(loss)
            norms.append(norm)
            done = number + 1
            if done == args.steps or (args.eval_every and done % args.eval_every == 0):
                synchronize(DEVICE)
                paused = time.perf_counter()
                val_losses[done] = val_loss(step.model, val)
                print(f"{name}, seed {seed}, step {done}: {val_losses[done]:.4f}", flush=True)
                if number >= first_timed:
                    seconds += paused - start
                    start = time.perf_counter()
    loader.close()
    values = torch.stack(losses).tolist()
    return {
        "variant": name,
        "seed": seed,
        "steps": args.steps,
        "warmup_steps": args.warmup_steps,
        "sequences": args.sequences,
        "max_lr": args.max_lr,
        "device": DEVICE_NAME,
        "losses": values,
        "val_losses": val_losses,
        "train_loss": statistics.mean(values[-MEAN_OVER:]),
        "val_loss": val_losses[args.steps],
        "largest_norm": float(torch.stack(norms[args.steps // 4 :]).max()),
        "ms": 1e3 * seconds / (args.steps - first_timed),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder written by `gptforge prepare` (gpt2)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warmup_steps", type=int, default=60)
    parser.add_argument("--eval_every", type=int, default=0, help="0: only at the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--max_lr", type=float, default=6e-4)
    parser.add_argument("--variants", default=";".join((*VARIANTS, *LATE)))
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of a step")
    parser.add_argument("--micro_batch", type=int, default=MICRO_BATCH)
    parser.add_argument("--length", type=int, default=GPT2.block_size)
    parser.add_argument("--layers", type=int, default=GPT2.n_layer)
    parser.add_argument("--width", type=int, default=GPT2.n_embd)
    args = parser.parse_args()
    args.variants = args.variants.split(";")
    for name in args.variants:
        if name.removesuffix(AFTER_WARMUP) not in VARIANTS:
            parser.error(f"--variants: {name!r} is none of {', '.join((*VARIANTS, *LATE))}")
    return args


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = GPTConfig(args.length, GPT2.vocab_size, args.layers, args.width // 64, args.width)
    rows = []
    for seed in args.seeds:
        bf16_loss = None
        for name in args.variants:
            found = train(name, seed, shape, args)
            with (args.out / "fp8-learning.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            if name == "bf16":
                bf16_loss = found["val_loss"]
            ratio = f"{found['val_loss'] / bf16_loss:.4f}" if bf16_loss else ""
            rows.append(
                f"| {name} | {seed} | {found['train_loss']:.4f} | {found['val_loss']:.4f} "
                f"| {ratio} | {found['largest_norm']:.2f} | {found['ms']:.1f} |"
            )
            print(rows[-1], flush=True)
    tokens = args.sequences * args.length
    print(
        f"\n{DEVICE_NAME}, {args.steps} steps of {tokens:,} tokens, of which {args.warmup_steps} "
        "are the warmup\n"
    )
    print(
        f"| variant | seed | training loss, last {MEAN_OVER} | held-out loss | to bf16's "
        "| largest norm after a quarter | ms/step |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
