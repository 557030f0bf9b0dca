"""Losses of the fast kernels and of the plain path, beside the spread of seeds.

    python benchmarks/loss_curves.py input.txt --out results

GPT-2 small, 500 steps. Three seeds of the weights take the plain path in float32 (autograd and
torch's cross-entropy); then each seed trains with this machine's defaults, from the same weights
over the same batches. Losses are means over ten steps: how far the fast run is from the plain one
of its seed, and how far the three plain runs are from each other.

Writes `loss-curves.json` and `loss-curves.png`, and prints a small table last. `--layers`,
`--width` and `--batch_size` make it small enough for a CPU.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.device import Precision, select_device, select_precision
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig, select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.optim.schedule import learning_rate
from gptforge.tokenizers import from_name
from gptforge.train.train_step import TrainStep

SEEDS = (1, 2, 3)
MEAN_OVER = 10


def train(
    shape: GPTConfig,
    tokens: np.ndarray,
    seed: int,
    *,
    steps: int,
    batch_size: int,
    device: torch.device,
    precision: Precision,
    kernels: KernelConfig,
) -> list[float]:
    """Losses of a run; the weights depend on the seed, the batches do not."""
    model = GPT(shape).init_weights(torch.Generator().manual_seed(seed)).to(device)
    step = TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        precision=precision,
        micro_batch_size=batch_size,
        grad_clip=1.0,
        kernels=kernels,
    )
    loader = DataLoader(
        tokens, context_length=shape.block_size, global_batch_size=batch_size, seed=0, shuffle=True,
        device=device,
    )  # fmt: skip
    config = Config(max_lr=6e-4, min_lr=6e-5, warmup_steps=50, max_steps=steps)
    losses = []
    for number in range(steps):
        losses.append(step(*loader.next_batch(), lr=learning_rate(config, number))[0])
    return [float(loss) for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, name = select_device("auto")
    fast = select_precision("auto", device)
    # As in a run, float32 matmuls use TF32, except those of the plain path.
    text = args.text.read_text(encoding="utf-8")
    tokens = from_name("gpt2", text).encode(text)
    shape = GPTConfig(args.length, 50304, args.layers, args.width // 64, args.width)
    paths = {
        "plain": (Precision(torch.float32, "to compare"), DEFAULT_KERNELS, "highest"),
        "fast": (fast, select_kernels(Config(), device, fast), "high"),
    }
    curves: dict[str, list[np.ndarray]] = {path: [] for path in paths}
    for path, (precision, kernels, matmul_precision) in paths.items():
        torch.set_float32_matmul_precision(matmul_precision)
        for seed in SEEDS:
            begin = time.perf_counter()
            losses = train(
                shape, tokens, seed, steps=args.steps, batch_size=args.batch_size, device=device,
                precision=precision, kernels=kernels,
            )  # fmt: skip
            count = len(losses) // MEAN_OVER * MEAN_OVER
            curves[path].append(np.array(losses[:count]).reshape(-1, MEAN_OVER).mean(1))
            seconds = time.perf_counter() - begin
            print(f"{path}, seed {seed}: {losses[-1]:.4f} at the end, {seconds:.0f} s", flush=True)
    plain, fast_curves = np.stack(curves["plain"]), np.stack(curves["fast"])
    distance = np.abs(fast_curves - plain).mean(0)
    spread = plain.max(0) - plain.min(0)
    found = {
        "device": name,
        "torch": torch.__version__,
        "plain": plain.tolist(),
        "fast": fast_curves.tolist(),
        "mean_distance_to_twin": float(distance.mean()),
        "mean_spread_of_seeds": float(spread.mean()),
        "points_inside": int((distance <= spread).sum()),
        "points": len(spread),
    }
    (args.out / "loss-curves.json").write_text(json.dumps(found), encoding="utf-8")
    draw(plain, fast_curves, args.out / "loss-curves.png")
    print(f"\n{name}, torch {torch.__version__}, fast: {fast.name}\n")
    print("| step | plain, three seeds | fast, same seeds | spread of seeds | fast to plain |")
    print("| --- | --- | --- | --- | --- |")
    for i in sorted({0, len(spread) // 8, len(spread) // 4, len(spread) // 2, len(spread) - 1}):
        one, two = (" ".join(f"{c[i]:.3f}" for c in x) for x in (plain, fast_curves))
        print(f"| {i * MEAN_OVER} | {one} | {two} | {spread[i]:.4f} | {distance[i]:.4f} |")
    print(
        f"\nmean distance fast to plain {distance.mean():.4f}, mean spread of seeds "
        f"{spread.mean():.4f}; within the spread at "
        f"{found['points_inside']} of {len(spread)} points"
    )


def draw(plain: np.ndarray, fast: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = np.arange(plain.shape[1]) * MEAN_OVER
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    top.fill_between(
        steps, plain.min(0), plain.max(0), color="#9bb7d4", label="plain path, fp32: 3 seeds"
    )
    for i, curve in enumerate(fast):
        name = "fast, same 3 seeds" if i == 0 else None
        top.plot(steps, curve, color="#c0392b", linewidth=1, label=name)
    top.set_ylabel("training loss (nats per token)")
    top.legend(frameon=False)
    bottom.plot(steps, plain.max(0) - plain.min(0), color="#5b84b1", label="spread of the seeds")
    bottom.plot(
        steps, np.abs(fast - plain).mean(0), color="#c0392b", label="fast to plain, same seed"
    )
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
