"""Cost of a checkpoint: wall time of the steps around an asynchronous save.

    python benchmarks/save_costs.py                                   GPT-2 small on a GPU
    python benchmarks/save_costs.py --preset debug --device cpu       to see that it works

Every step is synchronized, to time it alone. As in training, the copies for a save are made on the
device and written to disk during the next steps.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.checkpoint.format import Snapshot
from gptforge.checkpoint.state_dict import model_state_dict, optimizer_state_dict, rng_state_dict
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.device import select_device, select_precision, synchronize
from gptforge.kernel_select import select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.tokenizers import from_name
from gptforge.training.train_step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save_every", type=int, default=20)
    args = parser.parse_args()
    config = dataclasses.replace(get_preset(args.preset), vocab_size=50304)
    device, name = select_device(args.device)
    torch.set_float32_matmul_precision("high")
    model = GPT(config.model).init_weights().to(device)
    precision = select_precision(config.dtype, device)
    step = TrainStep(
        model,
        build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        ),
        config,
        precision=precision,
        kernels=select_kernels(Config(), device, precision),
    )
    if device.type == "cuda":
        step.compile()
    batch = random_batch(config, device)
    for _ in range(3):
        step(*batch, lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        saver = AsyncSaver(
            CheckpointStore(Path(folder)), tokenizer=from_name("byte", ""), config="", keep=0
        )
        plain, saving, writing = [], [], []
        save_seconds = []
        save_start = 0.0
        for index in range(args.steps):
            is_writing = saver._running is not None and not saver._running.done()
            if save_start and not is_writing:
                save_seconds.append(time.perf_counter() - save_start)
                save_start = 0.0
            synchronize(device)
            start = time.perf_counter()
            step(*batch, lr=1e-4)
            is_saving = index % args.save_every == 10 and index < args.steps - 10
            if is_saving:
                snapshot = Snapshot(
                    model=model_state_dict(model),
                    optimizer=optimizer_state_dict(model, step.optimizer),
                    rng_state=rng_state_dict(device),
                    state={},
                )
                save_start = time.perf_counter()
                saver.save_async(index, snapshot, is_best=False)
                del snapshot
            synchronize(device)
            seconds = time.perf_counter() - start
            (saving if is_saving else writing if is_writing else plain).append(seconds)
        saver.wait()
    print(f"{args.preset} on {device} ({name}), torch {torch.__version__}")
    baseline = statistics.median(plain)
    print("| step | count | median ms | max ms | median against the others |")
    print("| --- | --- | --- | --- | --- |")
    for label, times in (
        ("without a save", plain),
        ("that starts a save", saving),
        ("while a save is written", writing),
    ):
        if times:
            median = statistics.median(times)
            print(
                f"| {label} | {len(times)} | {median * 1e3:.1f} | {max(times) * 1e3:.1f} "
                f"| {median / baseline - 1:+.1%} |"
            )
    extra = sum(saving) + sum(writing) - baseline * (len(saving) + len(writing))
    print(f"total {extra / max(1, len(saving)) * 1e3:.0f} ms per save; written in ", end="")
    print(", ".join(f"{seconds:.1f} s" for seconds in save_seconds))


if __name__ == "__main__":
    main()
