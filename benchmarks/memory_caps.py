"""Does it fit? A few updates of each preset on a GPU whose memory is capped.

    python benchmarks/memory_caps.py

GPT-2 small within 8 GB, and xl within 80 GB, as a card of that size would have it: the program
finds the micro-batch by itself, or takes the savings that the flags name. The cap is torch's, on
what it may take from the device. Prints what was found and the peak.
"""

import argparse
import dataclasses

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.builders.step_timing import build_bench_step
from gptforge.device import synchronize
from gptforge.presets import get_preset

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
    for name, gigabytes, savings in CASES:
        if args.only not in (None, name):
            continue
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        config = dataclasses.replace(get_preset(name), vocab_size=50304, **savings)
        step = build_bench_step(config, (), print)
        torch.cuda.reset_peak_memory_stats(device)
        batch = random_batch(config, device)
        for _ in range(2):
            loss, _ = step(*batch, lr=1e-4)
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        held = torch.cuda.max_memory_reserved(device) / 1e9
        how = ", ".join(savings) or "nothing"
        lines.append(
            f"| {name} | {gigabytes} | {how} | {step.micro_batch_size} | {peak:.1f} | {held:.1f} "
            f"| {float(loss):.3f} |"
        )
        print(lines[-1], flush=True)
        del step, batch, loss
    print(f"\n{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| preset | cap, GB | saved by | micro-batch found | peak, GB | held, GB | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |", *lines, sep="\n")


if __name__ == "__main__":
    main()
