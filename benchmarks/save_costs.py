"""What a save costs the training beside it: wall time of the updates around one.

    python benchmarks/save_costs.py                                   GPT-2 small on a GPU
    python benchmarks/save_costs.py --preset debug --device cpu       to see that it works

Each update is waited for, so that its wall time is its own. A save begins behind some of them, as
in training: its copies are made on the device and travel to the disk while the next ones compute.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.checkpoint.state_dict import model_state_dict, optimizer_state_dict, rng_state_dict
from gptforge.checkpoint.store import CheckpointStore, Snapshot
from gptforge.config import Config, GPTConfig
from gptforge.device import select_device, select_precision, synchronize
from gptforge.kernel_select import select_kernels
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, get_preset
from gptforge.tokenizers import from_name
from gptforge.train.train_step import TrainStep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save_every", type=int, default=20)
    args = parser.parse_args()
    config = get_preset(args.preset)
    device, name = select_device(args.device)
    torch.set_float32_matmul_precision("high")
    model = GPT(GPTConfig(**{**vars(config.model), "vocab_size": 50304})).init_weights().to(device)
    precision = select_precision(config.dtype, device)
    step = TrainStep(
        model,
        build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        ),
        precision=precision,
        micro_batch_size=config.batch_size,
        grad_clip=config.grad_clip,
        kernels=select_kernels(Config(), device, precision),
    )
    if device.type == "cuda":
        step.compile()
    shape = (config.global_batch_size, config.context_length + 1)
    tokens = torch.randint(0, 50257, shape, device=device)
    for _ in range(3):
        step(tokens[:, :-1], tokens[:, 1:], lr=1e-4)
    with tempfile.TemporaryDirectory() as folder:
        saver = AsyncSaver(
            CheckpointStore(Path(folder)), tokenizer=from_name("byte", ""), config="", keep=0
        )
        plain, saving, beside = [], [], []
        saved_in = []
        begun = 0.0
        for number in range(args.steps):
            is_busy = saver._thread is not None and saver._thread.is_alive()
            if begun and not is_busy:
                saved_in.append(time.perf_counter() - begun)
                begun = 0.0
            synchronize(device)
            start = time.perf_counter()
            step(tokens[:, :-1], tokens[:, 1:], lr=1e-4)
            is_saving = number % args.save_every == 10 and number < args.steps - 10
            if is_saving:
                snapshot = Snapshot(
                    model=model_state_dict(model),
                    optimizer=optimizer_state_dict(model, step.optimizer),
                    rng_state=rng_state_dict(device),
                    state={},
                )
                begun = time.perf_counter()
                saver.save_async(number, snapshot, is_best=False)
                del snapshot
            synchronize(device)
            seconds = time.perf_counter() - start
            (saving if is_saving else beside if is_busy else plain).append(seconds)
        saver.wait()
    print(f"{args.preset} on {device} ({name}), torch {torch.__version__}")
    usual = statistics.median(plain)
    print("| update | how many | median ms | longest ms | median against the usual |")
    print("| --- | --- | --- | --- | --- |")
    for label, times in (
        ("usual", plain),
        ("with a save begun behind it", saving),
        ("while a save is written", beside),
    ):
        if times:
            middle = statistics.median(times)
            print(
                f"| {label} | {len(times)} | {middle * 1e3:.1f} | {max(times) * 1e3:.1f} "
                f"| {middle / usual - 1:+.1%} |"
            )
    extra = sum(saving) + sum(beside) - usual * (len(saving) + len(beside))
    print(f"in all {extra / max(1, len(saving)) * 1e3:.0f} ms a save; written in ", end="")
    print(", ".join(f"{seconds:.1f} s" for seconds in saved_in))


if __name__ == "__main__":
    main()
