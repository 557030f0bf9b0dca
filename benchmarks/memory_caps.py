"""Train a few steps of each preset on a GPU with capped memory.

    python benchmarks/memory_caps.py

GPT-2 small in 8 GB, and xl in 80 GB, as on a card of that size: the program finds the micro-batch.
The cap is torch's own, on its caching allocator. Prints the micro-batch and the peak.
"""

import argparse
import dataclasses

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.builders.step_timing import build_bench_step
from gptforge.device import synchronize
from gptforge.presets import get_preset
from gptforge.report.log_handler import log_to

CASES = (
    ("gpt2", 8, {}),
    ("gpt2", 8, {"activation_checkpointing": True}),
    ("gpt2-xl", 80, {}),
    ("gpt2-xl", 48, {"activation_checkpointing": True}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="one preset")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    lines = []
    for name, gigabytes, flags in CASES:
        if args.only not in (None, name):
            continue
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        config = dataclasses.replace(get_preset(name), vocab_size=50304, **flags)
        with log_to(print):
            step = build_bench_step(config, ())
        torch.cuda.reset_peak_memory_stats(device)
        batch = random_batch(config, device)
        for _ in range(2):
            loss, _ = step(*batch, lr=1e-4)
        synchronize(device)
        allocated = torch.cuda.max_memory_allocated(device) / 1e9
        reserved = torch.cuda.max_memory_reserved(device) / 1e9
        lines.append(
            f"| {name} | {gigabytes} | {', '.join(flags) or 'none'} | {step.micro_batch_size} "
            f"| {allocated:.1f} | {reserved:.1f} | {float(loss):.3f} |"
        )
        print(lines[-1], flush=True)
        del step, batch, loss
    print(f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| preset | cap, GB | flags | micro-batch | peak allocated, GB | reserved, GB | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |", *lines, sep="\n")


if __name__ == "__main__":
    main()
