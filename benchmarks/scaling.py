"""How training speeds up with the GPUs of a host: weak and strong scaling, and gpt2-xl in shards.

    python benchmarks/scaling.py --out scaling                  GPT-2 small on 1, 2, 4, ... GPUs
    python benchmarks/scaling.py --out scaling --xl             and gpt2-xl under FSDP2 on all
    python benchmarks/scaling.py --out scaling --only xl        that alone
    python benchmarks/scaling.py --out scaling --preset debug --device cpu --ranks 2     to try it

Weak scaling: each GPU learns from the configuration's whole step (131,072 tokens), so N GPUs from N
times as many. Strong scaling: all share one. Both are held to the slowest GPU of the same host
running alone, while all the others run alone beside it: heat and power are then the same. The three
take turns in one process a GPU; figures are medians over the turns. Writes scaling.json and
scaling.png.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptforge.bench.train_speed import random_batch
from gptforge.builders.train_step import build_train_step
from gptforge.builders.trainer import seed_everything
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.config import Config
from gptforge.device import (
    peak_flops,
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
from gptforge.train.train_step import TrainStep

VOCABULARY = 50304


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="gpt2", choices=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ranks", type=int, default=0, help="at most; 0: as many as GPUs")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="updates in a turn")
    parser.add_argument("--xl", action="store_true", help="also gpt2-xl under FSDP2, on all ranks")
    parser.add_argument("--only", choices=["small", "xl"], help="one of the two")
    parser.add_argument("--xl_preset", default="gpt2-xl", choices=PRESETS)
    parser.add_argument("--micro_batch", type=int, default=0, help="of gpt2-xl; 0: as fits")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing for xl")
    parser.add_argument("--out", default="scaling", help="folder for figures and picture")
    parser.add_argument("--child", choices=["small", "xl"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    most = args.ranks or torch.cuda.device_count() or 2
    counts = [n for n in (1, 2, 4, 8, 16) if n < most] + [most]
    found: dict[str, Any] = {"torch": torch.__version__, "small": [], "xl": []}
    if args.only != "xl":
        found["small"] = [launch("small", count, out) for count in counts]
    if args.xl or args.only == "xl":
        found["xl"] = [launch("xl", most, out)]
    (out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n")
    if found["small"]:
        draw(found["small"], out / "scaling.png", title=args.preset)
    tell(found, args)


def launch(what: str, count: int, out: Path) -> dict[str, Any]:
    """Measure on `count` ranks, which torchrun starts."""
    own = [word for word in sys.argv[1:] if word != "--xl"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *torchrun, str(Path(__file__)), *own, "--child", what]
    begin = time.perf_counter()
    done = subprocess.run(command, check=False)
    if done.returncode:
        return {"ranks": count, "failed": done.returncode}
    figures = json.loads((out / f"{what}-{count}.json").read_text())
    return {**figures, "seconds_in_all": time.perf_counter() - begin}


def child(args: argparse.Namespace) -> None:
    ranks = init_distributed(args.device)
    device, name = select_device(ranks.local_device or args.device)
    figures = small(args, ranks, device) if args.child == "small" else xl(args, ranks, device)
    figures |= {"ranks": ranks.world_size, "device": name, "torch": torch.__version__}
    if ranks.is_main:
        path = Path(args.out) / f"{args.child}-{ranks.world_size}.json"
        path.write_text(json.dumps(figures, indent=1) + "\n")
    ranks.shutdown()


def build(config: Config, ranks: Comm, device: torch.device, *given: str) -> TrainStep:
    def say(text: str) -> None:
        if ranks.is_main:
            print(text, file=sys.stderr, flush=True)

    precision = select_precision(config.dtype, device)
    seed_everything(config, rank=ranks.rank)
    opening = OpenedRun("new", config)
    return build_train_step(config, opening, device, precision, explicit=given, log=say, comm=ranks)


def small(args: argparse.Namespace, ranks: Comm, device: torch.device) -> dict[str, Any]:
    """A turn of each: alone on every GPU at once, weak scaling, strong scaling."""
    one = dataclasses.replace(get_preset(args.preset), vocab_size=VOCABULARY)
    many = dataclasses.replace(
        one, gradient_accumulation_steps=one.gradient_accumulation_steps * ranks.world_size
    )
    with ranks.pause_stall_check():
        alone = build(one, SINGLE_PROCESS, device)
    together = alone if ranks.world_size == 1 else build(many, ranks, device)
    batch = random_batch(one, device)
    share = tuple(x[: one.global_batch_size // ranks.world_size] for x in batch)
    runs: dict[str, Callable[[], object]] = {
        "alone": lambda: alone(*batch, lr=1e-4),
        "weak": lambda: together(*batch, lr=1e-4),
        "strong": lambda: together(*share, lr=1e-4),
    }
    seconds: dict[str, list[list[float]]] = {label: [] for label in runs}
    for run in runs.values():
        timed(run, 3, ranks, device)
    for _ in range(args.turns):
        for label, run in runs.items():
            own = timed(run, args.steps, ranks, device)
            seconds[label].append([float(s) for s in ranks.all_gather(torch.tensor(own))])
    sums = []
    if ranks.world_size > 1:
        gradients = torch.zeros(formulas.num_params(one.model), device=device)
        for _ in range(args.turns + 2):
            sums.append(timed(lambda: ranks.all_reduce(gradients), args.steps, ranks, device))
    # The slowest GPU counts: the others wait for it.
    medians = {
        label: max(statistics.median(own) for own in zip(*turns, strict=True))
        for label, turns in seconds.items()
    }
    return {
        "way": together.backend_name,
        "micro_batch": together.micro_batch_size,
        "tokens": one.tokens_per_step,
        "flops_per_token": formulas.flops_per_token(one.model, one.context_length),
        "peak_flops": peak_flops(device),
        "gradient_bytes": 4 * formulas.num_params(one.model),
        "sum_seconds": statistics.median(sums[2:]) if sums else 0.0,
        "medians": medians,
        "turns": seconds,
    }


def xl(args: argparse.Namespace, ranks: Comm, device: torch.device) -> dict[str, Any]:
    """A model in shards: its speed, MFU and memory."""
    config = dataclasses.replace(
        get_preset(args.xl_preset),
        vocab_size=VOCABULARY,
        parallel="fsdp",
        activation_checkpointing=args.recompute,
    )
    given = ()
    if args.micro_batch:
        whole = config.global_batch_size
        config = dataclasses.replace(
            config,
            batch_size=args.micro_batch,
            gradient_accumulation_steps=whole // args.micro_batch,
        )
        given = ("batch_size",)
    begin = time.perf_counter()
    with ranks.pause_stall_check():
        step = build(config, ranks, device, *given)
    batch = tuple(
        x[: config.global_batch_size // ranks.world_size] for x in random_batch(config, device)
    )

    def run() -> object:
        return step(*batch, lr=1e-4)

    timed(run, 1, ranks, device)
    ready = time.perf_counter() - begin
    timed(run, 2, ranks, device)
    turns = [timed(run, max(1, args.steps // 5), ranks, device) for _ in range(args.turns)]
    slowest = max(float(s) for s in ranks.all_gather(torch.tensor(statistics.median(turns))))
    rate = config.tokens_per_step / slowest
    flops = formulas.flops_per_token(config.model, config.context_length)
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "way": step.backend_name,
        "compiled": step.is_compiled,
        "preset": args.xl_preset,
        "micro_batch": step.micro_batch_size,
        "recompute": args.recompute,
        "seconds": slowest,
        "turns": turns,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu": rate * flops / peak / ranks.world_size if peak else None,
        "first_step_seconds": ready,
        "peak_bytes": memory,
    }


def timed(run: Callable[[], object], steps: int, ranks: Comm, device: torch.device) -> float:
    """Seconds of one, of `steps` that all ranks begin at once."""
    with ranks.pause_stall_check():
        ranks.all_true(True)
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        synchronize(device)
        return (time.perf_counter() - begin) / steps


def efficiencies(figures: dict[str, Any]) -> tuple[float, float]:
    """Weak and strong, of the slowest alone."""
    m, n = figures["medians"], figures["ranks"]
    return m["alone"] / m["weak"], m["alone"] / m["strong"] / n


def draw(small: list[dict[str, Any]], path: Path, *, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [f for f in small if "medians" in f]
    counts = [f["ranks"] for f in good]
    weak, strong = zip(*(efficiencies(f) for f in good), strict=True)
    figure, axis = pyplot.subplots(figsize=(7, 4))
    lines = [
        ("weak: as many tokens a GPU", weak, TRAIN_COLOR, (0, 9)),
        ("strong: as many tokens in all", strong, VAL_COLOR, (0, -16)),
    ]
    for label, shares, color, beside in lines:
        percent = [100 * share for share in shares]
        axis.plot(counts, percent, "o-", color=color, linewidth=2, label=label)
        for count, share in zip(counts, percent, strict=True):
            axis.annotate(
                f"{share:.1f}", (count, share), beside, textcoords="offset points", ha="center",
                fontsize=9, color=color, bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
    axis.axhline(100, color=MUTED_COLOR, linewidth=0.8, zorder=0)
    axis.set_xticks(counts)
    axis.set_xlabel("GPUs of one host" if good[0]["peak_flops"] else "ranks", color=TEXT_COLOR)
    axis.set_ylabel("% of the slowest one alone", color=TEXT_COLOR)
    axis.set_ylim(min(80.0, 100 * min(strong) - 5), max(103.0, 100 * max(*weak, *strong) + 3))
    axis.set_title(
        f"{title}, {good[0]['tokens']:,} tokens a step", loc="left", fontsize=11, color=TEXT_COLOR
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axis.tick_params(colors=TEXT_COLOR, labelsize=9)
    axis.legend(frameon=False, labelcolor=TEXT_COLOR, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def tell(found: dict[str, Any], args: argparse.Namespace) -> None:
    every = found["small"] + found["xl"]
    print(f"\n{args.preset} on {every[0].get('device')}, torch {torch.__version__}\n")
    if found["small"]:
        print(
            "| ranks | alone, ms | weak, ms | tokens/s | of alone | strong, ms | tokens/s "
            f"| of alone | gradients' sum, ms |\n{'| --- ' * 9}|"
        )
    for f in found["small"]:
        if "failed" in f:
            print(f"| {f['ranks']} | failed with {f['failed']} |")
            continue
        m, n, (weak, strong) = f["medians"], f["ranks"], efficiencies(f)
        print(
            f"| {n} | {1e3 * m['alone']:.2f} | {1e3 * m['weak']:.2f} | "
            f"{n * f['tokens'] / m['weak']:,.0f} | {weak:.1%} | {1e3 * m['strong']:.2f} | "
            f"{f['tokens'] / m['strong']:,.0f} | {strong:.1%} | {1e3 * f['sum_seconds']:.2f} |"
        )
    for f in found["xl"]:
        if "failed" in f:
            print(f"\ngpt2-xl failed with {f['failed']}")
            continue
        mfu = f"{f['mfu']:.1%}" if f["mfu"] else "no peak known"
        print(
            f"\n{f['preset']}, FSDP2 on {f['ranks']} ranks, micro-batches of {f['micro_batch']}, "
            f"{'' if f['compiled'] else 'not '}compiled: {1e3 * f['seconds']:.0f} ms a step, "
            f"{f['tokens_per_second']:,.0f} tokens/s, {f['tokens_per_second'] / f['ranks']:,.0f} a "
            f"rank, MFU {mfu}, {f['peak_bytes'] / 1e9:.1f} GB, first step after "
            f"{f['first_step_seconds']:.0f} s"
        )
    print("\nMFU = tokens/s x (6 N + 12 L C T) / peak; of alone: the slowest, all running at once")


if __name__ == "__main__":
    main()
