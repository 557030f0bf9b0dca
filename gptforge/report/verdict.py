"""What a run came to, in plain words: the truth about what was learned."""

from typing import Any

from gptforge.report.metrics import History
from gptforge.shell import quote

CLOSE = 0.005
"""Losses within half a percent of each other count as level."""
FEW = 10
"""Logged training losses that are taken together: one by one they waver."""


def verdict(
    history: History,
    *,
    total_steps: int,
    epochs: float,
    out_dir: str,
    has_val: bool,
    split_hint: str = "use",
    program: str = "python gpt.py",
) -> str:
    """A few sentences on a finished or stopped run.

    Args:
        history: its train and eval events.
        total_steps: updates made.
        epochs: times the text was seen.
        out_dir: the run folder, for the command at the end.
        is_judged: whether a part of the text is held out.
        how_to_part: what to do with --val_fraction, where nothing is held out.
        program: how this program is called.
    """
    if has_val and not history.evals:
        lines = ["The model was not judged yet: training ended before the first evaluation."]
    elif has_val:
        lines = _held_out(history, total_steps)
    else:
        lines = _training_only(history, epochs, split_hint)
    if not _broke_down(history):
        lines.append(f"Try it: {program} sample {quote(out_dir)}")
    return "\n".join(lines)


def _broke_down(history: History) -> bool:
    """Whether the losses ended in what is no number, and none that was judged ever was one."""
    scored = [event for event in history.evals if event["val_loss"] is not None]
    return bool(history.train) and history.train[-1]["loss"] is None and not scored


def _held_out(history: History, total_steps: int) -> list[str]:
    scored = [event for event in history.evals if event["val_loss"] is not None]
    if not scored:
        return ["The held-out loss was never a number: training broke down."]
    best = min(scored, key=lambda event: float(event["val_loss"]))
    last = scored[-1]
    lines = [
        f"Best held-out loss {best['val_loss']:.4f} ({best['val_bpb']:.3f} bits per byte) "
        f"at step {best['step']} of {total_steps}, epoch {best['epoch']:.1f}."
    ]
    end = int(last["step"])
    if len(scored) < 2:
        lines.append("It was judged only once, so whether it would get better is not known.")
    elif best is last:
        lines.append(_trend(scored))
    elif last["val_loss"] > best["val_loss"] * (1 + CLOSE):
        lines.append(_why_worse(history, best, last))
    elif _is_early(int(best["step"]), end):
        lines.append("After that it stayed level: more steps alone would not help.")
    else:
        lines.append(
            f"In the {end - best['step']} steps after that it stood level: whether more steps "
            "would help is not known."
        )
    return lines


def _why_worse(history: History, best: dict[str, Any], last: dict[str, Any]) -> str:
    """What a held-out loss that rose behind its best has to say, beside the training loss."""
    then, now = (_train_loss(history, int(event["step"])) for event in (best, last))
    rose = (
        f"After that it got worse, {last['val_loss']:.4f} at the end with a training loss of "
        f"{now:.4f}"
    )
    if last["epoch"] > 1 and now < last["val_loss"] and now < then:
        return f"{rose}: the model had begun to learn the text by heart. The best one was kept."
    if now > then * (1 + CLOSE):
        return (
            f"{rose}, which had been {then:.4f}: it learned no more, and a smaller --max_lr may "
            "help. The best one was kept."
        )
    return f"{rose}: not by learning the text by heart, so it may come and go. The best was kept."


def _trend(scored: list[dict[str, Any]]) -> str:
    """Whether a held-out loss that was best at the end was still falling there."""
    best, end = float(scored[-1]["val_loss"]), int(scored[-1]["step"])
    early = [event for event in scored if _is_early(int(event["step"]), end)]
    if not early:
        return (
            f"It was first judged at step {scored[0]['step']}, too late to tell whether it was "
            "still getting better when training ended."
        )
    if best >= min(float(event["val_loss"]) for event in early) * (1 - CLOSE):
        return "It had all but stopped getting better when training ended."
    since = int(early[-1]["step"])
    if 3 * since < end:
        return (
            f"It got better after step {since}, and was judged too seldom since then to tell "
            "whether it still did when training ended."
        )
    return "It was still getting better when training ended: more steps would help."


def _is_early(step: int, end: int) -> bool:
    """Whether a loss has had time to change by the end.

    Two thirds of the way, not less: at the very end the small learning rate hides the trend.
    """
    return 3 * step <= 2 * end


def _training_only(history: History, epochs: float, how_to_part: str) -> list[str]:
    if not history.train:
        return ["No step was logged."]
    loss = float(history.train[-1]["loss"] or float("nan"))
    lines = [f"Training loss {loss:.4f} after {epochs:.1f} times through the text."]
    lines.append(
        "Nothing was held out, so this says how well the text is remembered, not how well the "
        f"model writes. To know, {how_to_part} --val_fraction 0.1."
    )
    return lines


def _train_loss(history: History, step: int) -> float:
    """The mean of the last few training losses logged before `step` updates were made."""
    before = [
        float(event["loss"])
        for event in history.train
        if event["step"] < step and event["loss"] is not None
    ][-FEW:]
    return sum(before) / len(before) if before else float("nan")
