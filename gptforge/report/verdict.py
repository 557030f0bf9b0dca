"""A few sentences on what a run has learned, by its losses."""

import math
import statistics

from gptforge.report.format import format_epochs, format_val_loss
from gptforge.report.metrics import FINAL_FIELDS, Event, History, series
from gptforge.shell import quote

LEVEL = 0.005  # losses within half a percent of each other count as equal
MEAN_OVER = 10  # logged training losses that are averaged: single ones are noisy


def verdict(
    history: History,
    *,
    max_steps: int,
    out_dir: str,
    has_val: bool,
    split_hint: str = "use",
    program: str = "python gpt.py",
) -> str:
    """Summarize a finished or stopped run, and name the `sample` command of `program`.

    `split_hint` says how to get a validation split, followed by `--val_fraction 0.1`.
    """
    if not has_val:
        lines = _without_val(history, split_hint)
    elif history.evals or history.dropped_best or history.final:
        lines = _with_val(history, max_steps)
    else:
        lines = ["The model was not evaluated: training ended before the first evaluation."]
    has_diverged = history.train and history.train[-1]["loss"] is None and not history.scored_evals
    if not has_diverged:
        lines.append(f"Try it: {program} sample {quote(out_dir)}")
    return "\n".join(lines)


def _without_val(history: History, split_hint: str) -> list[str]:
    if not history.train:
        return ["No step was logged."]
    [loss] = series(history.train[-1:], "loss")
    return [
        f"Training loss {loss:.4f} nats per token after {format_epochs(history.epochs)} epochs.",
        "No text was held out, so this measures how well the text is memorized, not how well the "
        f"model writes. To measure that, {split_hint} --val_fraction 0.1.",
    ]


def _with_val(history: History, max_steps: int) -> list[str]:
    evals, best = history.scored_evals, history.best_eval
    if best is None:
        if history.final:
            return [_final_loss(history, history.final, max_steps)]
        return ["The held-out loss was always NaN or Inf: training diverged."]
    last, final = (evals or [best])[-1], history.final
    steps_since_best = last["step"] - best["step"]
    if best is history.dropped_best or (final and final["best_step"] != best["step"]):
        trend = (
            "Its steps were then dropped, to resume from before them, and no evaluation since then "
            "was better."
        )
    elif len(evals) < 2:
        trend = "It was evaluated only once, so whether it is still improving is unknown."
    elif best is last:
        trend = _improvement(evals)
    elif last["val_loss"] > best["val_loss"] * (1 + LEVEL):
        trend = _why_worse(history, best, last)
    elif _is_early(best, last):
        trend = "After that it stayed level: more steps alone would not help."
    else:
        trend = (
            f"In the {steps_since_best} steps after that it stayed level: whether more steps "
            "would help is unknown."
        )
    if final is None:
        tokens = f", over {best['val_tokens']:,} tokens" if best.get("val_tokens") else ""
        best_loss = (
            f"Best held-out loss {best['val_loss']:.4f} nats per token, {best['val_bpb']:.4f} bits "
            f"per byte{tokens}, at step {best['step']} of {max_steps}, epoch "
            f"{format_epochs(best['epoch'])}."
        )
        return [best_loss, trend]
    best_loss, subset = _final_loss(history, final, max_steps), last.get("val_tokens", 0)
    if 0 < subset < final["final_val_tokens"]:
        trend = f"The evaluations during training read {subset:,} of these tokens. {trend}"
    return [best_loss, trend]


def _final_loss(history: History, final: Event, max_steps: int) -> str:
    epochs = {e["step"]: f", epoch {format_epochs(e['epoch'])}" for e in history.evals}
    loss = format_val_loss(*(final[name] for name in FINAL_FIELDS))
    return (
        f"Best held-out loss {loss}, all that is held out: step {final['best_step']} of "
        f"{max_steps}{epochs.get(final['best_step'], '')}."
    )


def _why_worse(history: History, best: Event, last: Event) -> str:
    """Tell overfitting from divergence by the training loss, where the held-out loss rose."""
    at_best, at_end = (_mean_train_loss(history, int(event["step"])) for event in (best, last))
    worse = (
        f"After that it got worse, from {best['val_loss']:.4f} to {last['val_loss']:.4f} nats per "
        f"token at the end, with a training loss of {at_end:.4f}"
    )
    if last["epoch"] > 1 and at_end < last["val_loss"] and at_end < at_best:
        return f"{worse}: the model began to overfit. The best checkpoint was kept."
    if at_end > at_best * (1 + LEVEL):
        return (
            f"{worse}, which had been {at_best:.4f}: training became unstable, and a smaller "
            "--max_lr may help. The best checkpoint was kept."
        )
    return f"{worse}: not by overfitting, so it may be temporary. The best checkpoint was kept."


def _improvement(evals: list[Event]) -> str:
    """Whether a held-out loss that was best at the end was still falling there."""
    last = evals[-1]
    early = [event for event in evals if _is_early(event, last)]
    if not early:
        return (
            f"It was first evaluated at step {evals[0]['step']}, too late to tell whether it was "
            "still improving when training ended."
        )
    if last["val_loss"] >= min(float(event["val_loss"]) for event in early) * (1 - LEVEL):
        return "It had almost stopped improving when training ended."
    since = int(early[-1]["step"])
    if 3 * since < last["step"]:
        return (
            f"It improved after step {since}, and was evaluated too rarely since then to tell "
            "whether it was still improving when training ended."
        )
    return "It was still improving when training ended: more steps would help."


def _is_early(event: Event, last: Event) -> bool:
    """Whether the event lies in the first two thirds of the steps before `last`.

    Not closer to the end: there the small learning rate hides the trend.
    """
    return bool(3 * event["step"] <= 2 * last["step"])


def _mean_train_loss(history: History, step: int) -> float:
    """Mean of the last few finite training losses that were logged before `step`."""
    losses = series((event for event in history.train if event["step"] < step), "loss")
    recent = list(filter(math.isfinite, losses))[-MEAN_OVER:]
    return statistics.fmean(recent) if recent else math.nan
