"""Cost of monitoring the loss: the checks of a step beside the step.

    python benchmarks/check_costs.py                         the CPU default
    python benchmarks/check_costs.py --preset gpt2           on a GPU

The checks are what a step does only to detect failures: whether loss and gradient norm are finite,
and the loss monitor's median over recent losses. Medians of many repeats.
"""

import argparse
import dataclasses
import statistics
import time

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.device import select_device, select_precision, synchronize
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.training.loss_monitor import LossMonitor
from gptforge.training.train_step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="shakespeare-cpu", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    config = get_preset(args.preset)
    vocab_size = 128 if config.tokenizer == "char" else 50304
    config = dataclasses.replace(config, vocab_size=vocab_size)
    device, name = select_device(args.device)
    model = GPT(config.model).init_weights().to(device)
    step = TrainStep(
        model,
        build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        ),
        config,
        precision=select_precision(config.dtype, device),
    )
    batch = random_batch(config, device)
    step_times = []
    for _ in range(args.steps):
        synchronize(device)
        start = time.perf_counter()
        loss, norm = step(*batch, lr=1e-4)
        synchronize(device)
        step_times.append(time.perf_counter() - start)
    step_time = statistics.median(step_times[3:])

    monitor = LossMonitor(lag=2 if device.type == "cuda" else 0, uses_grad_scaler=False)
    total = torch.zeros((), device=device)
    check_times = []
    for index in range(2000):
        synchronize(device)
        start = time.perf_counter()
        _ = (~norm.isfinite()).float()
        is_finite = loss.isfinite()
        total += torch.where(is_finite, loss, 0)
        monitor.update(index, 0, loss, norm)
        synchronize(device)
        check_times.append(time.perf_counter() - start)
    cost = statistics.median(check_times)
    print(f"{args.preset} on {device} ({name}), torch {torch.__version__}")
    print(
        f"step {step_time * 1e3:.2f} ms, checks {cost * 1e3:.4f} ms: {cost / step_time:.3%} of a "
        "step"
    )


if __name__ == "__main__":
    main()
