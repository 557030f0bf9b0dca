"""Training tokens/s beside a plain PyTorch loop, interleaved in one process.

    python benchmarks/step_speed.py                                   GPT-2 small, needs a large GPU
    python benchmarks/step_speed.py --ablate                          and without each optimization
    python benchmarks/step_speed.py --preset debug --device cpu       to see that it works

The plain loop is that of most GPT-2 trainers, from the same weights over the same batches: the
model compiled as a whole, autocast, mean cross-entropy over all logits, fused AdamW and clipping.
`gptforge bench --baseline plain` compares with it too; this adds the ablation.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from gptforge.bench.baselines import build_baseline
from gptforge.bench.train_speed import StepFn, random_batch, time_training
from gptforge.config import Config
from gptforge.device import select_device, select_precision
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig, select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.training.train_step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ablate", action="store_true", help="also without each kernel choice")
    args = parser.parse_args()

    config = dataclasses.replace(get_preset(args.preset), vocab_size=50304)
    device, name = select_device(args.device)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = GPT(config.model).init_weights().to(device)
    precision = select_precision(config.dtype, device)
    best = select_kernels(Config(), device, precision)
    choices = {"gptforge": best}
    if args.ablate:
        choices |= {
            "fp32 residual": dataclasses.replace(best, residual_dtype=None),
            "without fused cross-entropy": dataclasses.replace(best, fused_cross_entropy=False),
            "without all of these": DEFAULT_KERNELS,
        }

    def build(kernels: KernelConfig) -> StepFn:
        replica = copy.deepcopy(model)
        step = TrainStep(
            replica,
            build_adamw(
                replica.parameters(),
                betas=(config.beta1, config.beta2),
                weight_decay=config.weight_decay,
            ),
            config,
            precision=precision,
            kernels=kernels,
        )
        if device.type == "cuda":
            step.compile()
        return lambda inputs, targets: step(inputs, targets, lr=1e-4)

    def build_plain() -> StepFn:
        baseline = build_baseline("plain", model, config, precision)
        return lambda inputs, targets: baseline(inputs, targets, lr=1e-4)

    factories: dict[str, Callable[[], StepFn]] = {
        label: partial(build, kernels) for label, kernels in choices.items()
    }
    factories["plain loop"] = build_plain
    batch = random_batch(config, device)
    results = time_training(factories, batch, config, repeats=args.repeats)
    plain = results[-1]

    print(f"\n{args.preset} on {name}, torch {torch.__version__}, {precision.name}")
    print(f"{config.tokens_per_step:,} tokens per step, medians of {args.repeats} repeats\n")
    print("| implementation | tokens/s | ms/step | TFLOP/s | first step, s | peak GB | speedup |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for result in results:
        peak = (result["peak_memory_bytes"] or 0) / 1e9
        print(
            f"| {result['implementation']} | {result['tokens_per_second']:,.0f} | "
            f"{result['ms_per_step']:.1f} | {result['tflops_per_second']:.1f} | "
            f"{result['first_step_seconds']:.1f} | {peak:.1f} | "
            f"{plain['ms_per_step'] / result['ms_per_step']:.3f} |"
        )


if __name__ == "__main__":
    main()
