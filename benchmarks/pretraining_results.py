"""Tables, verdicts and pictures of what `pretraining.py` has run."""

import functools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from small_texts import Result

from gptforge.cli.parsing import parse_train_args
from gptforge.config import Config
from gptforge.report.curves import TEXT_COLOR, new_figure, style_axes

COLORS = ("#4c78a8", "#d1495b", "#2a9d8f", "#b8791f", "#7a6bb0", "#7f5539")
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
TITLES = {"race": "GPT-2 small, AdamW and Muon", "dtypes": "GPT-2 small, matmuls by dtype"}
COMPLETE = "complete"
FROM_SCRATCH, FINE_TUNED = "from scratch", "fine-tuned"


@functools.cache
def parse(flags: str) -> Config:
    return parse_train_args(shlex.split(flags))[0]


def optimizer_of(result: Mapping[str, Any]) -> tuple[str, float, float]:
    """Optimizer, rate and decay of a result."""
    c = parse(result["flags"])
    if c.optimizer == "muon":
        return c.optimizer, c.muon_lr, c.muon_weight_decay
    return c.optimizer, c.max_lr, c.weight_decay


def crossing(result: Result, level: float, column: int = 1) -> float | None:
    """The step at which a curve first reaches a loss, between two evaluations on a line."""
    before = None
    for point in result["curve"]:
        step, loss = point[0], point[column]
        if loss <= level:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - level) / (before[1] - loss)
        before = step, loss
    return None


def row(result: Result) -> str:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    tokens = result["steps"] * result["tokens_per_step"] / 1e6
    steps = f"{result['steps']:,}"
    if result["state"] != COMPLETE:
        steps += f" of {result['max_steps']:,}, {result['state']}"
    return (
        f"{result['name']} | {cell(result['val_loss'], '.4f')} "
        f"| {cell(result['last_val_loss'], '.4f')} | {cell(result['val_bpb'], '.4f')} "
        f"| {cell(result['best_step'], ',')} | {steps} | {tokens:,.1f} "
        f"| {result['ms_per_step']:.1f} | {result['tok_per_sec']:,.0f} "
        f"| {cell(result['seconds'], '.0f')}"
    )


def table(results: Sequence[Result]) -> str:
    """The runs of a mode; those of a sweep with the best first."""
    titles = ("run", "held-out loss", "last evaluation, a part", "bits per byte", "best step")
    titles += ("steps", "tokens, M", "ms/step", "tokens/s", "seconds")
    rows = [f"| data | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    rows += [f"| {result['data'].split()[0]} | {row(result)} |" for result in results]
    return "\n".join(rows)


def verdict(results: Sequence[Result]) -> str:
    """What the runs of a mode say, if all of them are finished."""
    lines = []
    if any(result["state"] != COMPLETE for result in results):
        return "Some runs are not finished: the same command continues."
    mode = results[0]["mode"]
    if mode == "sweep":
        lines += [best_line(results, optimizer) for optimizer in ("adamw", "muon")]
    if mode == "race" and len(results) == 2:
        adamw, muon = results
        level = min(point[1] for point in adamw["curve"])
        step = crossing(muon, level)
        total = adamw["steps"] * adamw["tokens_per_step"]
        slower = muon["ms_per_step"] / adamw["ms_per_step"] - 1
        reached = "does not reach it"
        if step is not None:
            tokens = step * muon["tokens_per_step"]
            reached = f"reaches it at {tokens / 1e6:,.1f}M, {tokens / total:.1%} of AdamW's tokens"
        lines.append(
            f"AdamW's best evaluation in {total / 1e6:,.1f}M tokens is {level:.4f}. "
            f"Muon {reached}; its steps take {slower:+.1%}. Their losses on all held-out text: "
            f"{adamw['val_loss']:.4f} and {muon['val_loss']:.4f}."
        )
    if mode == "dtypes":
        first = results[0]
        for other in results[1:]:
            lines.append(
                f"{other['name']} to {first['name']}: held-out loss "
                f"{other['val_loss'] / first['val_loss'] - 1:+.2%}, best of the evaluations on all "
                f"held-out text, tokens/s {other['tok_per_sec'] / first['tok_per_sec'] - 1:+.1%}."
            )
    if mode == "finetune":
        for scratch, tuned in by_text(results).values():
            step = crossing(tuned, scratch["val_bpb"], 2)
            reached = "does not reach it"
            if step is not None:
                reached = f"reaches it at step {step:,.0f}, 1/{scratch['steps'] / step:,.0f}"
            lines.append(
                f"{scratch['data'].split()[0]}: {tuned['val_bpb'] / scratch['val_bpb'] - 1:+.2%} "
                f"bits per byte in {tuned['steps']:,} steps. From scratch {scratch['val_bpb']:.4f} "
                f"after {scratch['steps']:,} steps; fine-tuning {reached}."
            )
    return "\n".join(lines)


def best_line(results: Sequence[Result], optimizer: str) -> str:
    """The best of an optimizer's runs, and whether it is at the edge of the grid."""
    found = [r for r in results if optimizer_of(r)[0] == optimizer and r["val_loss"] is not None]
    if not found:
        return f"{optimizer}: no run has a loss."
    best = min(found, key=lambda r: r["val_loss"])
    edges = []
    for index, name in ((1, "rate"), (2, "decay")):
        values = [optimizer_of(r)[index] for r in found]
        if min(values) < max(values) and optimizer_of(best)[index] in (min(values), max(values)):
            edges.append(name)
    edge = f"; its {' and '.join(edges)} at the edge: extend the grid" if edges else ""
    return f"Best of {len(found)}: {best['name']}: {best['val_loss']:.4f}{edge}."


def by_text(results: Sequence[Result]) -> dict[str, tuple[Result, Result]]:
    """The runs from scratch and fine-tuned of each text that has both."""
    found: dict[str, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result["data"], {})[result["name"]] = result
    return {
        data: (runs[FROM_SCRATCH], runs[FINE_TUNED])
        for data, runs in found.items()
        if len(runs) == 2
    }


def draw(results: Sequence[Result], path: Path) -> None:
    """A sweep: loss against rate. Other modes: loss against tokens, or steps by text."""
    mode = results[0]["mode"]
    if mode == "sweep":
        panels = {
            name: [r for r in results if optimizer_of(r)[0] == optimizer]
            for optimizer, name in OPTIMIZERS.items()
        }
    elif mode == "finetune":
        panels = {data.split()[0]: list(runs) for data, runs in by_text(results).items()}
    else:
        panels = {TITLES[mode]: list(results)}
    panels = {name: found for name, found in panels.items() if found}
    figure = new_figure()
    figure.set_size_inches(max(8, 5.2 * len(panels)), 5)
    for column, (name, found) in enumerate(panels.items()):
        shared = figure.axes[0] if figure.axes and mode == "sweep" else None
        axes = figure.add_subplot(1, len(panels), column + 1, sharey=shared)
        style_axes(axes, name)
        (_draw_sweep if mode == "sweep" else _draw_curves)(axes, found)
        axes.tick_params(colors=TEXT_COLOR, labelsize=9)
        for line in (axes.xaxis.label, axes.yaxis.label):
            line.set(color=TEXT_COLOR, fontsize=9.5)
        axes.legend(frameon=False, fontsize=9, labelcolor=TEXT_COLOR)
    figure.savefig(path)


def _draw_sweep(axes: Any, results: Sequence[Result]) -> None:
    lines: dict[float, list[tuple[float, float]]] = {}
    for result in results:
        if result["val_loss"] is not None:
            _, rate, decay = optimizer_of(result)
            lines.setdefault(decay, []).append((rate, result["val_loss"]))
    for color, (decay, points) in zip(COLORS, sorted(lines.items()), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=f"decay {decay:g}")
    rates = sorted({rate for points in lines.values() for rate, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate (logarithmic)")
    axes.set_ylabel("held-out loss, nats per token")


def _draw_curves(axes: Any, results: Sequence[Result]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

    is_finetune = results[0]["mode"] == "finetune"
    for color, result in zip(COLORS, results, strict=False):
        scale = 1 if is_finetune else result["tokens_per_step"] / 1e6
        steps, losses, bits = zip(*result["curve"], strict=True) if result["curve"] else ((),) * 3
        values = bits if is_finetune else losses
        optimizer, _, rest = result["name"].partition(",")
        label = f"{OPTIMIZERS[optimizer]},{rest}" if optimizer in OPTIMIZERS else result["name"]
        axes.plot([step * scale for step in steps], values, ".-", color=color, label=label)
    if values := results[0]["curve"]:
        level = min(point[2 if is_finetune else 1] for point in values)
        axes.axhline(level, color=COLORS[0], linewidth=0.9, linestyle="--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_locator(MaxNLocator(7))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    x = "step" if is_finetune else "tokens trained on, millions"
    y = "bits per byte" if is_finetune else "nats per token"
    axes.set_xlabel(f"{x} (logarithmic)")
    axes.set_ylabel(f"held-out loss, {y} (logarithmic)")
