"""Losses of the fast kernels and of the plain path, beside the spread of seeds.

    python benchmarks/loss_curves.py input.txt --out results
    python benchmarks/loss_curves.py input.txt --out results --dtypes bfloat16 fp8
    python benchmarks/loss_curves.py input.txt --out results --seeds 1 --without attention cublaslt

GPT-2 small, 500 steps. Three seeds of the weights take the plain path in float32 (autograd and
torch's cross-entropy); then each seed trains with the fast kernels in each dtype, from the same
weights over the same batches. Losses are means over ten steps: how far a fast run is from the plain
one of its seed, and how far the three plain runs are from each other. `--without` finds out which
kernel a difference comes from: each one named gets a run in the first dtype where torch's own
operations replace it.

Writes `loss-curves.json` and `loss-curves.png`, and prints a small table last. `--layers`,
`--width` and `--batch_size` make it small enough for a CPU.
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from gptforge.config import Config, GPTConfig
from gptforge.data.dataloader import DataLoader
from gptforge.device import Precision, select_device, select_precision
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig, select_kernels
from gptforge.kernels.attention import SdpaAttention
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.optim.schedule import learning_rate
from gptforge.tokenizers import from_name
from gptforge.training.train_step import TrainStep

MEAN_OVER = 10
# Of each kernel: the function that selects it, and one that selects torch's operations instead.
REPLACEMENTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "attention": (
        "gptforge.training.backends.manual_layers.select_attention",
        lambda *_, **__: SdpaAttention(),
    ),
    "cublaslt": ("gptforge.kernels.matmul.find_plan", lambda *_, **__: None),
    **{
        name: (f"gptforge.kernels.{name}.uses_triton", lambda _: False)
        for name in ("cross_entropy", "embedding", "gelu", "layer_norm", "reductions")
    },
}  # fmt: skip


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
    config = Config(
        batch_size=batch_size, max_lr=6e-4, min_lr=6e-5, warmup_steps=50, max_steps=steps
    )
    step = TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        config,
        precision=precision,
        kernels=kernels,
    )
    loader = DataLoader(
        tokens, context_length=shape.block_size, global_batch_size=batch_size, seed=0, shuffle=True,
        device=device,
    )  # fmt: skip
    losses = []
    for number in range(steps):
        if kernels.float8 and number in (0, config.warmup_steps):
            # As `--dtype fp8` does, after a warmup in bfloat16.
            step.set_kernels(dataclasses.replace(kernels, float8=number > 0))
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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["auto"], help="of the fast runs")
    parser.add_argument(
        "--without", nargs="+", default=[],
        choices=[*REPLACEMENTS, "manual_backward", "bfloat16_residual", "all"],
        help="what to replace, one at a time; bfloat16_residual: autograd with a residual in "
        "float32; all: autograd and torch's autocast",
    )  # fmt: skip
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, name = select_device("auto")
    # As in a run, float32 matmuls use TF32, except those of the plain path.
    text = args.text.read_text(encoding="utf-8")
    tokens = from_name("gpt2", text).encode(text)
    shape = GPTConfig(args.length, 50304, args.layers, args.width // 64, args.width)
    paths = {"plain": (Precision(torch.float32, "to compare"), DEFAULT_KERNELS, "highest")}
    for dtype in args.dtypes:
        precision = select_precision(dtype, device)
        paths[precision.name] = (precision, select_kernels(Config(), device, precision), "high")
    precision, kernels, _ = list(paths.values())[1]
    for kernel in args.without:
        others = {
            "manual_backward": dataclasses.replace(kernels, manual_backward=False),
            "bfloat16_residual": dataclasses.replace(
                kernels, manual_backward=False, residual_dtype=None
            ),
            "all": DEFAULT_KERNELS,
        }.get(kernel, kernels)
        paths[f"without {kernel}"] = (precision, others, "high")
    curves: dict[str, list[np.ndarray]] = {path: [] for path in paths}
    for path, (precision, kernels, matmul_precision) in paths.items():
        torch.set_float32_matmul_precision(matmul_precision)
        target, function = REPLACEMENTS.get(path.removeprefix("without "), ("", None))
        replaced = mock.patch(target, function) if function else contextlib.nullcontext()
        for seed in range(1, args.seeds + 1):
            begin = time.perf_counter()
            with replaced:
                losses = train(
                    shape, tokens, seed, steps=args.steps, batch_size=args.batch_size,
                    device=device, precision=precision, kernels=kernels,
                )  # fmt: skip
            count = len(losses) // MEAN_OVER * MEAN_OVER
            curves[path].append(np.array(losses[:count]).reshape(-1, MEAN_OVER).mean(1))
            seconds = time.perf_counter() - begin
            print(f"{path}, seed {seed}: {losses[-1]:.4f} at the end, {seconds:.0f} s", flush=True)
    losses = {path: np.stack(runs) for path, runs in curves.items()}
    plain = losses.pop("plain")  # (seeds, points), as all others
    spread = plain.max(0) - plain.min(0)
    distances = {path: np.abs(runs - plain).mean(0) for path, runs in losses.items()}
    found = {
        "device": name,
        "torch": torch.__version__,
        "losses": {"plain": plain.tolist()} | {path: x.tolist() for path, x in losses.items()},
        "mean_spread_of_seeds": float(spread.mean()),
        "mean_distance_to_twin": {path: float(x.mean()) for path, x in distances.items()},
        "points_inside": {path: int((x <= spread).sum()) for path, x in distances.items()},
        "points": len(spread),
    }
    (args.out / "loss-curves.json").write_text(json.dumps(found), encoding="utf-8")
    draw(plain, losses, args.out / "loss-curves.png")
    print(f"\n{name}, torch {torch.__version__}; losses of {args.seeds} seeds\n")
    print(f"| step | plain | spread | {' | | '.join(losses)} | |")
    print("| --- | --- | --- |" + " --- | --- |" * len(losses))
    for i in sorted({0, len(spread) // 8, len(spread) // 4, len(spread) // 2, len(spread) - 1}):
        cells = [" ".join(f"{c[i]:.3f}" for c in plain), f"{spread[i]:.4f}"]
        for path, runs in losses.items():
            cells += [" ".join(f"{c[i]:.3f}" for c in runs), f"{distances[path][i]:.4f}"]
        print(f"| {i * MEAN_OVER} | {' | '.join(cells)} |")
    for path, distance in distances.items():
        if args.seeds == 1:
            print(f"\n{path}: mean distance to plain {distance.mean():.4f}")
            continue
        print(
            f"\n{path}: mean distance to plain {distance.mean():.4f}, mean spread of seeds "
            f"{spread.mean():.4f}; within the spread at "
            f"{found['points_inside'][path]} of {len(spread)} points"
        )


def draw(plain: np.ndarray, losses: dict[str, np.ndarray], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = np.arange(plain.shape[1]) * MEAN_OVER
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    top.fill_between(
        steps,
        plain.min(0),
        plain.max(0),
        color="#9bb7d4",
        label=f"plain path, fp32: {len(plain)} seeds",
    )
    bottom.plot(steps, plain.max(0) - plain.min(0), color="#5b84b1", label="spread of the seeds")
    for i, (name, runs) in enumerate(losses.items()):
        color = ("#c0392b", "#27632a", "#8e44ad", *plt.get_cmap("tab10").colors)[i]
        for j, curve in enumerate(runs):
            label = f"{name}, same seeds" if j == 0 else None
            top.plot(steps, curve, color=color, linewidth=1, label=label)
        distance = np.abs(runs - plain).mean(0)
        bottom.plot(steps, distance, color=color, label=f"{name} to plain, same seed")
    top.set_ylabel("training loss (nats per token)")
    bottom.set_ylim(bottom=0)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
