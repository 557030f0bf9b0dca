"""Weak and strong scaling over the GPUs of a host, and gpt2-xl with FSDP2.

    python benchmarks/scaling.py --out scaling                  GPT-2 small on 1, 2, 4, ... GPUs
    python benchmarks/scaling.py --out scaling --xl             and gpt2-xl under FSDP2 on all
    python benchmarks/scaling.py --out scaling --only xl        that alone
    python benchmarks/scaling.py --out scaling --preset debug --device cpu --ranks 2     to try it

Weak scaling: each GPU has a full global batch (131,072 tokens), so N GPUs train on N times as many.
Strong scaling: all share one. Both are compared with the slowest GPU of the host on its own, while
all others run on their own beside it: heat and power are then equal. The three are interleaved in
one process per GPU; results are medians of the repeats. Writes scaling.json and scaling.png.
"""

import argparse
import dataclasses
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.builders.build_train_step import build_train_step
from gptforge.config import Config
from gptforge.device import (
    peak_flops,
    seed_everything,
    select_device,
    select_precision,
    synchronize,
)
from gptforge.distributed import SINGLE_PROCESS, Comm, init_distributed
from gptforge.estimate import formulas
from gptforge.presets import PRESETS, get_preset
from gptforge.report.curves import (
    MUTED_COLOR,
    TEXT_COLOR,
    TRAIN_COLOR,
    VAL_COLOR,
)
from gptforge.training.train_step import TrainStep

VOCAB_SIZE = 50304


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ranks", type=int, default=0, help="at most; 0: as many as GPUs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="in a repeat")
    parser.add_argument("--xl", action="store_true", help="also gpt2-xl under FSDP2, on all ranks")
    parser.add_argument("--only", choices=["small", "xl"], help="one of the two")
    parser.add_argument("--xl_preset", default="gpt2-xl", choices=PRESETS)
    parser.add_argument("--micro_batch", type=int, default=0, help="of gpt2-xl; 0: as fits")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing for xl")
    parser.add_argument("--out", default="scaling", help="folder for results and plot")
    parser.add_argument("--child", choices=["small", "xl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    max_ranks = args.ranks or torch.cuda.device_count() or 2
    counts = [n for n in (1, 2, 4, 8, 16) if n < max_ranks] + [max_ranks]
    results: dict[str, Any] = {"torch": torch.__version__, "small": [], "xl": []}
    if args.only != "xl":
        results["small"] = [launch("small", count, out) for count in counts]
    if args.xl or args.only == "xl":
        results["xl"] = [launch("xl", max_ranks, out)]
    (out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    if results["small"]:
        draw(results["small"], out / "scaling.png", title=args.preset)
    print_tables(results, args)


def launch(name: str, count: int, out: Path) -> dict[str, Any]:
    """Measure on `count` ranks, started by torchrun."""
    flags = [flag for flag in sys.argv[1:] if flag != "--xl"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *torchrun, str(Path(__file__)), *flags, "--child", name]
    start = time.perf_counter()
    done = subprocess.run(command, check=False)
    if done.returncode:
        return {"ranks": count, "failed": done.returncode}
    result = json.loads((out / f"{name}-{count}.json").read_text())
    return {**result, "total_seconds": time.perf_counter() - start}


def child(args: argparse.Namespace) -> None:
    comm = init_distributed(args.device)
    if comm.is_main:
        logging.basicConfig(format="%(message)s")  # on stderr
        logging.getLogger("gptforge").setLevel(logging.INFO)
    device, name = select_device(comm.local_device or args.device)
    result = small(args, comm, device) if args.child == "small" else xl(args, comm, device)
    result |= {"ranks": comm.world_size, "device": name, "torch": torch.__version__}
    if comm.is_main:
        path = Path(args.out) / f"{args.child}-{comm.world_size}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    comm.shutdown()


def build(config: Config, comm: Comm, device: torch.device, *explicit: str) -> TrainStep:
    precision = select_precision(config.dtype, device)
    seed_everything(config, rank=comm.rank)
    return build_train_step(config, device, precision, explicit=explicit, comm=comm)


def small(args: argparse.Namespace, comm: Comm, device: torch.device) -> dict[str, Any]:
    """Time one GPU on its own, on all GPUs at once; weak scaling; strong scaling."""
    one = dataclasses.replace(get_preset(args.preset), vocab_size=VOCAB_SIZE)
    many = dataclasses.replace(
        one, gradient_accumulation_steps=one.gradient_accumulation_steps * comm.world_size
    )
    with comm.pause_stall_check():
        single = build(one, SINGLE_PROCESS, device)
    parallel = single if comm.world_size == 1 else build(many, comm, device)
    batch = random_batch(one, device)
    local_batch = tuple(x[: one.global_batch_size // comm.world_size] for x in batch)
    runs: dict[str, Callable[[], object]] = {
        "single": lambda: single(*batch, lr=1e-4),
        "weak": lambda: parallel(*batch, lr=1e-4),
        "strong": lambda: parallel(*local_batch, lr=1e-4),
    }
    seconds: dict[str, list[list[float]]] = {label: [] for label in runs}
    for run in runs.values():
        timed(run, 3, comm, device)
    for _ in range(args.repeats):
        for label, run in runs.items():
            local = timed(run, args.steps, comm, device)
            seconds[label].append([float(s) for s in comm.all_gather(torch.tensor(local))])
    all_reduces = []
    if comm.world_size > 1:
        gradients = torch.zeros(formulas.num_params(one.model), device=device)
        for _ in range(args.repeats + 2):
            all_reduces.append(timed(lambda: comm.all_reduce(gradients), args.steps, comm, device))
    # The slowest GPU counts: the others wait for it.
    medians = {
        label: max(statistics.median(times) for times in zip(*repeats, strict=True))
        for label, repeats in seconds.items()
    }
    return {
        "backend": parallel.backend_name,
        "micro_batch": parallel.micro_batch_size,
        "tokens": one.tokens_per_step,
        "flops_per_token": formulas.flops_per_token(one.model, one.context_length),
        "peak_flops": peak_flops(device),
        "gradient_bytes": 4 * formulas.num_params(one.model),
        "all_reduce_seconds": statistics.median(all_reduces[2:]) if all_reduces else 0.0,
        "medians": medians,
        "repeats": seconds,
    }


def xl(args: argparse.Namespace, comm: Comm, device: torch.device) -> dict[str, Any]:
    """Time a sharded model: speed, MFU and memory."""
    config = dataclasses.replace(
        get_preset(args.xl_preset),
        vocab_size=VOCAB_SIZE,
        parallel="fsdp",
        activation_checkpointing=args.recompute,
    )
    explicit = ()
    if args.micro_batch:
        global_batch_size = config.global_batch_size
        config = dataclasses.replace(
            config,
            batch_size=args.micro_batch,
            gradient_accumulation_steps=global_batch_size // args.micro_batch,
        )
        explicit = ("batch_size",)
    start = time.perf_counter()
    with comm.pause_stall_check():
        step = build(config, comm, device, *explicit)
    batch = tuple(
        x[: config.global_batch_size // comm.world_size] for x in random_batch(config, device)
    )

    def run() -> object:
        return step(*batch, lr=1e-4)

    timed(run, 1, comm, device)
    first_step = time.perf_counter() - start
    timed(run, 2, comm, device)
    repeats = [timed(run, max(1, args.steps // 5), comm, device) for _ in range(args.repeats)]
    slowest = max(float(s) for s in comm.all_gather(torch.tensor(statistics.median(repeats))))
    rate = config.tokens_per_step / slowest
    flops = formulas.flops_per_token(config.model, config.context_length)
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "backend": step.backend_name,
        "compiled": step.is_compiled,
        "preset": args.xl_preset,
        "micro_batch": step.micro_batch_size,
        "recompute": args.recompute,
        "seconds": slowest,
        "repeats": repeats,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu": rate * flops / peak / comm.world_size if peak else None,
        "first_step_seconds": first_step,
        "peak_bytes": memory,
    }


def timed(run: Callable[[], object], steps: int, comm: Comm, device: torch.device) -> float:
    """Seconds of a step, of `steps` that all ranks start together."""
    with comm.pause_stall_check():
        comm.all_true(True)
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            run()
        synchronize(device)
        return (time.perf_counter() - start) / steps


def efficiencies(result: dict[str, Any]) -> tuple[float, float]:
    """Weak and strong scaling, compared with the slowest GPU on its own."""
    m, n = result["medians"], result["ranks"]
    return m["single"] / m["weak"], m["single"] / m["strong"] / n


def draw(small: list[dict[str, Any]], path: Path, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    complete = [f for f in small if "medians" in f]
    counts = [f["ranks"] for f in complete]
    weak, strong = zip(*(efficiencies(f) for f in complete), strict=True)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    lines = [
        ("weak: constant tokens per GPU", weak, TRAIN_COLOR, (0, 9)),
        ("strong: constant tokens per step", strong, VAL_COLOR, (0, -16)),
    ]
    for label, values, color, offset in lines:
        percent = [100 * share for share in values]
        axis.plot(counts, percent, "o-", color=color, linewidth=2, label=label)
        for count, share in zip(counts, percent, strict=True):
            axis.annotate(
                f"{share:.1f}", (count, share), offset, textcoords="offset points", ha="center",
                fontsize=9, color=color, bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
    axis.axhline(100, color=MUTED_COLOR, linewidth=0.8, zorder=0)
    axis.set_xticks(counts)
    axis.set_xlabel("GPUs of one host" if complete[0]["peak_flops"] else "ranks", color=TEXT_COLOR)
    axis.set_ylabel("efficiency (% of the slowest GPU alone)", color=TEXT_COLOR)
    axis.set_ylim(min(80.0, 100 * min(strong) - 5), max(103.0, 100 * max(*weak, *strong) + 3))
    axis.set_title(
        f"{title}, {complete[0]['tokens']:,} tokens per step",
        loc="left",
        fontsize=11,
        color=TEXT_COLOR,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axis.tick_params(colors=TEXT_COLOR, labelsize=9)
    axis.legend(frameon=False, labelcolor=TEXT_COLOR, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def print_tables(results: dict[str, Any], args: argparse.Namespace) -> None:
    every = results["small"] + results["xl"]
    print(f"\n{args.preset} on {every[0].get('device')}, torch {torch.__version__}\n")
    if results["small"]:
        print(
            "| ranks | single, ms | weak, ms | tokens/s | efficiency | strong, ms | tokens/s "
            f"| efficiency | all-reduce, ms |\n{'| --- ' * 9}|"
        )
    for f in results["small"]:
        if "failed" in f:
            print(f"| {f['ranks']} | failed with {f['failed']} |")
            continue
        m, n, (weak, strong) = f["medians"], f["ranks"], efficiencies(f)
        print(
            f"| {n} | {1e3 * m['single']:.2f} | {1e3 * m['weak']:.2f} | "
            f"{n * f['tokens'] / m['weak']:,.0f} | {weak:.1%} | {1e3 * m['strong']:.2f} | "
            f"{f['tokens'] / m['strong']:,.0f} | {strong:.1%} | "
            f"{1e3 * f['all_reduce_seconds']:.2f} |"
        )
    for f in results["xl"]:
        if "failed" in f:
            print(f"\ngpt2-xl failed with {f['failed']}")
            continue
        mfu = f"{f['mfu']:.1%}" if f["mfu"] else "no peak known"
        print(
            f"\n{f['preset']}, FSDP2 on {f['ranks']} ranks, micro-batches of {f['micro_batch']}, "
            f"{'' if f['compiled'] else 'not '}compiled: {1e3 * f['seconds']:.0f} ms/step, "
            f"{f['tokens_per_second']:,.0f} tokens/s, {f['tokens_per_second'] / f['ranks']:,.0f} "
            f"per rank, MFU {mfu}, {f['peak_bytes'] / 1e9:.1f} GB, first step after "
            f"{f['first_step_seconds']:.0f} s"
        )
    print("\nMFU = tokens/s x (6 N + 12 L C T) / peak; efficiency: to the slowest single GPU")


if __name__ == "__main__":
    main()
