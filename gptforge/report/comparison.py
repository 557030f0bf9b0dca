"""Compare runs: where their configurations differ, and whether a difference is more than noise."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gptforge.config import FIELDS, MAY_CHANGE_ON_RESUME
from gptforge.report.run_info import COMPLETE, RunInfo

SIGNIFICANCE = 0.05
"""Probability of calling a difference real where there is none, over all pairs of groups."""
HIDDEN = frozenset({"config", "out_dir", "restart"})  # fields that are not compared
LEARNED = sorted(
    (FIELDS.keys() - MAY_CHANGE_ON_RESUME - {"seed", "tokenizer"})
    | {"max_steps", "eval_every", "patience"}
)
"""Fields that change what is learned. Text, tokenizer and global batch size count, too."""
METRIC_NAMES = {"val_loss": "held-out loss", "val_bpb": "held-out bits per byte"}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by the seed alone, and the best value of the metric of each complete one."""

    name: str
    runs: Sequence[RunInfo]
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over seeds; infinite without a score, so that it sorts last."""
        return statistics.fmean(self.scores) if self.scores else math.inf

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


class Difference(NamedTuple):
    """How much lower the mean of the better group is."""

    better: str
    worse: str
    difference: float
    # Of Student's t-test with the spread pooled over all groups, times the number of pairs of
    # groups (Bonferroni); None if no group has two seeds.
    p_value: float | None
    is_real: bool | None  # whether it is too large to be chance; None if that is unknown


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    runs: Sequence[RunInfo]
    fields: Mapping[str, Sequence[Any]]  # that differ, with the value of each run
    metric: str | None  # val_loss; val_bpb if the tokenizers differ; None: nothing is comparable
    notes: Sequence[str]  # what to know before comparing
    groups: Sequence[Group]  # best first
    differences: Sequence[Difference]  # of the best group to each other one

    @property
    def verdict(self) -> list[str]:
        """The conclusions, as sentences."""
        if self.metric is None:
            return ["No verdict: the losses of these runs cannot be compared."]
        what = METRIC_NAMES[self.metric]
        lines = [
            f"{group.name}: mean {what} {group.mean:.4f}, spread {group.spread:.4f} over "
            f"{len(group.scores)} seeds"
            for group in self.groups
            if group.spread is not None
        ]
        if len(self.groups) == 1:
            return [*lines, "They differ by the seed at most: nothing to choose between."]
        if not self.differences:
            return [*lines, "No verdict: too few complete runs."]
        return lines + [_sentence(difference, what) for difference in self.differences]


def compare(runs: Sequence[RunInfo]) -> Comparison:
    """Compare two or more runs.

    By their losses on all held-out text, unless one lacks that: then by evaluations in training.
    """
    partial = [run for run in runs if run.subset_tokens]
    if not all(run.history.final for run in runs):
        runs = [replace(run, history=replace(run.history, final=None)) for run in runs]
    if not all(run.saved for run in runs):
        # Of a run without checkpoints only the name of its tokenizer is known.
        runs = [replace(run, tokenizer=run.config.tokenizer) for run in runs]
    metric, notes = _comparable_metric(runs)
    if partial:
        names = ", ".join(run.path.as_posix() for run in partial)
        notes.append(
            f"without a loss on all held-out text: {names}; so the losses of all runs are those of "
            "their evaluations during training"
        )
    for run in runs:
        name = run.path.as_posix()
        if run.history.best is None:
            notes.append(f"{name} has no held-out loss")
        elif run.state not in COMPLETE:
            progress = f"step {run.history.steps:,} of {run.config.max_steps:,}"
            notes.append(f"{name} is {run.state} at {progress}: it does not count")
    groups = _group(runs, metric or "val_loss", notes)
    differences = _differences([group for group in groups if group.scores]) if metric else []
    return Comparison(runs, _differing(runs), metric, notes, groups, differences)


def student_t_p_value(t: float, df: int) -> float:
    """Two-sided p-value of Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta, odd = math.atan(abs(t) / math.sqrt(df)), df % 2
    term = total = float(df > 1)
    for k in range(1, (df - odd) // 2):
        term *= math.cos(theta) ** 2 * (2 * k - 1 + odd) / (2 * k + odd)
        total += term
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + math.cos(theta) * inside)
    return max(0.0, 1 - inside)


def _comparable_metric(runs: Sequence[RunInfo]) -> tuple[str | None, list[str]]:
    """The metric by which the runs can be compared, and why not by the loss."""
    if not all(run.has_same_text(runs[0]) for run in runs):
        texts = ", ".join(sorted({run.text for run in runs}))
        return None, [f"they were trained or evaluated on different texts ({texts})"]
    is_partial = any(run.config.eval_tokens and not run.history.final for run in runs)
    parts = ["val_fraction", "split_by_name"]
    parts += ["eval_tokens", "context_length"] if is_partial else []
    if names := [name for name in parts if len({getattr(run.config, name) for run in runs}) > 1]:
        fields = ", ".join(names)
        return None, [f"they were evaluated on different parts of the text ({fields} differ)"]
    if len({run.tokenizer for run in runs}) == 1:
        return "val_loss", []
    note = "their tokenizers differ, so losses per token cannot be compared"
    if is_partial:
        return None, [f"{note}, and with --eval_tokens nor can bits per byte"]
    return "val_bpb", [f"{note}: bits per byte are"]


def _group(runs: Sequence[RunInfo], metric: str, notes: list[str]) -> list[Group]:
    """Group the runs by all but their seeds, best group first."""
    found: dict[object, list[list[RunInfo]]] = {}
    for run in runs:
        learned = [getattr(run.config, field) for field in LEARNED]
        text = next(index for index, other in enumerate(runs) if other.has_same_text(run))
        minutes = run.config.time_limit if run.state == "time limit" else 0.0
        key = (*learned, minutes, run.config.global_batch_size, text, run.tokenizer)
        same_config = found.setdefault(key, [])
        for members in same_config:
            if run.has_same_schedule(members[0]):
                members.append(run)
                break
        else:
            if same_config:
                notes.append(
                    f"{run.path.as_posix()} differs from {same_config[0][0].path.as_posix()} in "
                    "its schedule: the --max_steps of one was raised while it trained"
                )
            same_config.append([run])
    groups = []
    for members in itertools.chain(*found.values()):
        scores: dict[int, float] = {}
        for run in members:
            if run.config.seed in scores:
                name = run.path.as_posix()
                notes.append(f"{name} repeats a configuration and seed: it counts only once")
            elif (best := run.history.best) and run.state in COMPLETE:
                scores[run.config.seed] = best[metric]
        count = f"{len(members)} runs like " if len(members) > 1 else ""
        groups.append(Group(count + members[0].path.as_posix(), members, list(scores.values())))
    return sorted(groups, key=lambda group: group.mean)


def _differences(groups: Sequence[Group]) -> list[Difference]:
    """Differences of the best group to the others."""
    df = sum(len(group.scores) - 1 for group in groups)
    pairs = len(groups) * (len(groups) - 1) // 2
    squares = sum((len(g.scores) - 1) * g.spread**2 for g in groups if g.spread is not None)
    found = []
    for worse in groups[1:]:
        better, p_value = groups[0], None
        size = worse.mean - better.mean
        if df:
            error = math.sqrt(squares / df * (1 / len(better.scores) + 1 / len(worse.scores)))
            t = size / error if error else (math.inf if size else 0.0)
            p_value = min(1.0, pairs * student_t_p_value(t, df))
        is_real = None if p_value is None else p_value < SIGNIFICANCE
        found.append(Difference(better.name, worse.name, size, p_value, is_real))
    return found


def _sentence(difference: Difference, what: str) -> str:
    better, worse, size, p_value, is_real = difference
    lower = f"The {what} of {better} is lower by {size:.4f} than that of {worse}"
    if is_real is None:
        return (
            f"{lower}. With one seed each, the spread over seeds is unknown and a small difference "
            "may be chance: train both with two or more other seeds (--seed) and compare all runs."
        )
    if is_real:
        return f"{lower}: real, large against the spread of seeds (p = {p_value:.2g})."
    return f"{lower}: no larger than between seeds (p = {p_value:.2g}), so no difference is shown."


def _differing(runs: Sequence[RunInfo]) -> dict[str, list[Any]]:
    """Fields, devices and versions that are not the same in all runs."""
    columns: dict[str, list[Any]] = {
        name: [getattr(run.config, name) for run in runs] for name in FIELDS if name not in HIDDEN
    }
    for name in ("device", "dtype", "gptforge", "torch"):
        columns[name] = [str(run.facts.get(name, "unknown")) for run in runs]
    return {name: values for name, values in columns.items() if any(v != values[0] for v in values)}
