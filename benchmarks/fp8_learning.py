"""Held-out loss of GPT-2 small after training in bfloat16, and in variants of fp8.

    gptforge prepare text.txt --out data/text
    python benchmarks/fp8_learning.py data/text --steps 300 --seeds 2 --out results

Steps of 131,072 tokens. All runs read the same batches; a seed changes the initial weights. The
held-out loss is evaluated in bfloat16, on up to 2 million tokens. `--variants` selects some, with
semicolons. Each run adds a line to fp8-learning.jsonl, and the table comes last.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from fp8 import DEVICE, GPT2, SEQUENCES, VARIANTS, build_variant, fast_accumulation

from gptforge.config import Config
from gptforge.data.dataloader import DataLoader
from gptforge.data.token_dataset import ShardDataset, read_shard_header
from gptforge.model import GPT
from gptforge.optim.schedule import learning_rate

VAL_TOKENS, MEAN_OVER = 2_000_000, 50


def read_split(folder: Path, split: str) -> ShardDataset:
    paths = sorted(folder.glob(f"{split}_*.bin"))
    return ShardDataset([read_shard_header(p) for p in paths], vocab_size=GPT2.vocab_size)


@torch.no_grad()
def val_loss(model: GPT, val: ShardDataset) -> float:
    length = GPT2.block_size
    count = min(VAL_TOKENS, len(val) - 1) // length
    tokens = torch.tensor(val[: count * length + 1].astype("int64"), device=DEVICE)
    x, y = tokens[:-1].view(-1, length), tokens[1:].view(-1, length)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        pairs = zip(x.split(16), y.split(16), strict=True)
        return float(torch.stack([model(a, b) for a, b in pairs]).sum()) / y.numel()


def train(name: str, seed: int, folder: Path, steps: int, max_lr: float) -> dict[str, Any]:
    loader = DataLoader(
        read_split(folder, "train"), context_length=GPT2.block_size, global_batch_size=SEQUENCES,
        seed=7, shuffle=True, device=DEVICE,
    )  # fmt: skip
    config = Config(max_lr=max_lr, min_lr=max_lr / 10, warmup_steps=60, max_steps=steps)
    losses, norms = [], []
    with fast_accumulation(VARIANTS[name][2]):
        step = build_variant(name, seed)
        for number in range(steps):
            if number == 5:
                torch.cuda.synchronize()
                start = time.perf_counter()
            loss, norm = step(*loader.next_batch(), lr=learning_rate(config, number))[:2]
            losses.append(loss)
            norms.append(norm)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    values = torch.stack(losses).tolist()
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "max_lr": max_lr,
        "device": torch.cuda.get_device_name(),
        "losses": values,
        "train_loss": statistics.mean(values[-MEAN_OVER:]),
        "val_loss": val_loss(step.model, read_split(folder, "val")),
        "largest_norm": float(torch.stack(norms[steps // 4 :]).max()),
        "ms": 1e3 * seconds / (steps - 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder written by `gptforge prepare` (gpt2)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--max_lr", type=float, default=6e-4)
    parser.add_argument("--variants", default=";".join(VARIANTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for name in args.variants.split(";"):
            found = train(name, seed, args.data, args.steps, args.max_lr)
            with (args.out / "fp8-learning.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            rows.append(
                f"| {name} | {seed} | {found['train_loss']:.4f} | {found['val_loss']:.4f} "
                f"| {found['largest_norm']:.2f} | {found['ms']:.1f} |"
            )
            print(rows[-1], flush=True)
    tokens = SEQUENCES * GPT2.block_size
    print(f"\n{torch.cuda.get_device_name()}, {args.steps} steps of {tokens:,} tokens\n")
    header = f"training loss, last {MEAN_OVER}"
    print(f"| variant | seed | {header} | held-out loss | largest norm after a quarter | ms/step |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
