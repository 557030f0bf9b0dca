"""Tokens a second of our update against the loop that most GPT-2 trainers have, in one process.

    python benchmarks/step_speed.py                                   GPT-2 small, needs a large GPU
    python benchmarks/step_speed.py --each                            and what each choice is worth
    python benchmarks/step_speed.py --preset debug --device cpu       to see that it works

The plain loop is the well-known recipe, on the same weights and batches: the model compiled whole,
autocast, mean cross-entropy outside the model over all logits, fused AdamW, clipping. All take
turns, so that a drift of the machine hits each. Numbers are medians over the turns.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptforge.config import Config
from gptforge.device import (
    autocast,
    select_device,
    select_precision,
    synchronize,
)
from gptforge.estimate import formulas
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig, select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.train.train_step import TrainStep


class PlainLoop:
    """One update, as the plain recipe makes it."""

    def __init__(self, model: GPT, config: Config, *, compiled: bool) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self.precision = select_precision(config.dtype, self.device)
        betas = (config.beta1, config.beta2)
        self.optimizer = build_adamw(
            model.parameters(), betas=betas, weight_decay=config.weight_decay
        )
        self.forward = torch.compile(model) if compiled else model

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, *, lr: float) -> None:
        steps = self.config.gradient_accumulation_steps
        size = self.config.batch_size
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with autocast(self.device, self.precision):
                logits = self.forward(x)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="updates in a turn")
    parser.add_argument("--each", action="store_true", help="also without each kernel choice")
    args = parser.parse_args()

    config = get_preset(args.preset)
    device, name = select_device(args.device)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    shape = copy.copy(config.model).__class__(**{**vars(config.model), "vocab_size": 50304})
    model = GPT(shape).init_weights().to(device)
    precision = select_precision(config.dtype, device)
    compiled = device.type == "cuda"
    best = select_kernels(Config(), device, precision)
    choices = {"gptforge": best}
    if args.each:
        choices |= {
            "float32 residual stream": dataclasses.replace(best, residual_dtype=None),
            "loss apart from its layer": dataclasses.replace(best, fused_cross_entropy=False),
            "none of these": DEFAULT_KERNELS,
        }

    def ours(kernels: KernelConfig) -> TrainStep:
        own = copy.deepcopy(model)
        betas = (config.beta1, config.beta2)
        step = TrainStep(
            own,
            build_adamw(own.parameters(), betas=betas, weight_decay=config.weight_decay),
            precision=precision,
            micro_batch_size=config.batch_size,
            grad_clip=config.grad_clip,
            kernels=kernels,
        )
        if compiled:
            step.compile()
        return step

    steps: dict[str, Callable[..., object]] = {
        label: ours(kernels) for label, kernels in choices.items()
    }
    steps["plain loop"] = PlainLoop(copy.deepcopy(model), config, compiled=compiled)
    tokens = torch.randint(
        0, 50257, (config.global_batch_size, config.context_length + 1), device=device
    )
    batch = tokens[:, :-1], tokens[:, 1:]

    first = {}
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    memory = {}
    for label, step in steps.items():
        begin = time.perf_counter()
        step(*batch, lr=1e-4)
        synchronize(device)
        first[label] = time.perf_counter() - begin
        for _ in range(2):
            step(*batch, lr=1e-4)
    for _ in range(args.turns):
        for label, step in steps.items():
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            begin = time.perf_counter()
            for _ in range(args.steps):
                step(*batch, lr=1e-4)
            synchronize(device)
            seconds[label].append((time.perf_counter() - begin) / args.steps)
            if device.type == "cuda":
                memory[label] = torch.cuda.max_memory_allocated(device) / 1e9

    flops = formulas.flops_per_token(shape, config.context_length)
    print(f"\n{args.preset} on {name}, torch {torch.__version__}, {precision.dtype}")
    print(f"{config.tokens_per_step:,} tokens a step, {flops / 1e6:,.0f} MFLOP a token\n")
    print(
        "| who | tokens/s | ms a step | TFLOP/s | first step, s | peak GB, all held "
        "| to the plain loop |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    plain = statistics.median(seconds["plain loop"])
    for label, times in seconds.items():
        median = statistics.median(times)
        rate = config.tokens_per_step / median
        print(
            f"| {label} | {rate:,.0f} | {median * 1e3:.1f} | "
            f"{rate * flops / 1e12:.1f} | {first[label]:.1f} | "
            f"{memory.get(label, float('nan')):.1f} | {plain / median:.3f} |"
        )


if __name__ == "__main__":
    main()
