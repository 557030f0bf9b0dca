"""What watching over the loss costs: the checks of a step against the step itself.

    python benchmarks/check_costs.py                         the CPU default
    python benchmarks/check_costs.py --preset gpt2           on a GPU

Checks are what a step does only to notice what went wrong: finite or not, for the update and for
the running mean, and the watch's median over recent losses. Medians over many repeats.
"""

import argparse
import statistics
import time

import torch

from gptforge.config import GPTConfig
from gptforge.device import select_device, select_precision, synchronize
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.train.loss_monitor import LossMonitor
from gptforge.train.train_step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="shakespeare-cpu", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    config = get_preset(args.preset)
    device, name = select_device(args.device)
    vocab = 128 if config.tokenizer == "char" else 50304
    model = GPT(GPTConfig(**{**vars(config.model), "vocab_size": vocab})).init_weights().to(device)
    step = TrainStep(
        model,
        build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        ),
        precision=select_precision(config.dtype, device),
        micro_batch_size=config.batch_size,
        grad_clip=config.grad_clip,
    )
    shape = (config.global_batch_size, config.context_length + 1)
    tokens = torch.randint(0, vocab, shape, device=device)
    times = []
    for _ in range(args.steps):
        synchronize(device)
        begin = time.perf_counter()
        loss, norm = step(tokens[:, :-1], tokens[:, 1:], lr=1e-4)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    update = statistics.median(times[3:])

    watch = LossMonitor(lag=2 if device.type == "cuda" else 0, uses_grad_scaler=False)
    total = torch.zeros((), device=device)
    checks = []
    for number in range(2000):
        synchronize(device)
        begin = time.perf_counter()
        _ = (~norm.isfinite()).float()
        counts = loss.isfinite()
        total += torch.where(counts, loss, 0)
        watch.update(number, 0, loss, norm)
        synchronize(device)
        checks.append(time.perf_counter() - begin)
    cost = statistics.median(checks)
    print(f"{args.preset} on {device} ({name}), torch {torch.__version__}")
    print(f"step {update * 1e3:.2f} ms, checks {cost * 1e3:.4f} ms: {cost / update:.3%} of a step")


if __name__ == "__main__":
    main()
