"""Compare runs: where their configurations differ, and whether a difference is more than noise."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from gptforge.config import FIELDS, MAY_CHANGE_ON_RESUME
from gptforge.report.run_info import COMPLETE, RunInfo

SIGNIFICANCE = 0.05
"""Probability of calling a difference real that is none, over all pairs of groups."""
HIDDEN = frozenset({"config", "out_dir", "restart"})
"""Fields that are not compared."""
LEARNED = (FIELDS.keys() - MAY_CHANGE_ON_RESUME - {"seed"}) | {
    *("max_steps", "eval_every", "patience"),
}
"""Fields that change what is learned. The text and the global batch size count, too."""
METRIC_NAMES = {"val_loss": "held-out loss", "val_bpb": "held-out bits per byte"}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by the seed alone.

    Attributes:
        name: of its runs.
        runs: all of them.
        scores: best value of the metric of each complete run.
    """

    name: str
    runs: Sequence[RunInfo]
    scores: Sequence[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def label(self) -> str:
        """Mean and spread, for people."""
        spread = "" if self.spread is None else f" ± {self.spread:.4f}"
        return f"{self.mean:.4f}{spread}" if self.scores else ""


@dataclass(frozen=True)
class Difference:
    """The difference of the means of two groups.

    Attributes:
        better: the group with the lower mean.
        worse: the other.
        p_value: of Student's t-test with the spread pooled over all groups, times the number of
            pairs (Bonferroni); None if no group has two seeds.
    """

    better: Group
    worse: Group
    p_value: float | None

    @property
    def size(self) -> float:
        """How much lower the better mean is."""
        return self.worse.mean - self.better.mean

    @property
    def is_real(self) -> bool:
        """Whether it is too large to be chance."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        names: short, different names of the runs.
        runs: as they were given.
        fields: the fields that differ, with the value of each run.
        metric: val_loss; val_bpb if the tokenizers differ; None if no metric is comparable.
        notes: what to know before comparing.
        groups: best first.
        differences: of the best group to each other one.
    """

    names: Sequence[str]
    runs: Sequence[RunInfo]
    fields: Mapping[str, Sequence[Any]]
    metric: str | None
    notes: Sequence[str]
    groups: Sequence[Group]
    differences: Sequence[Difference]

    @property
    def verdict(self) -> list[str]:
        """What may be concluded, in sentences."""
        if self.metric is None:
            return ["No verdict: the losses of these runs cannot be compared."]
        scored = [group for group in self.groups if group.scores]
        what = METRIC_NAMES[self.metric]
        lines = [
            f"{group.name}: mean {what} {group.mean:.4f}, spread {group.spread:.4f} over "
            f"{len(group.scores)} seeds"
            for group in scored
            if group.spread is not None
        ]
        if len(scored) < 2:
            same = "They differ by the seed alone, so there is nothing to choose between."
            return [*lines, same if len(self.groups) == 1 else "Too few complete runs to compare."]
        return lines + [_sentence(difference, what) for difference in self.differences]


def compare(runs: Sequence[RunInfo]) -> Comparison:
    """Compare two or more runs."""
    names = _short_names(runs)
    metric, notes = _comparable_metric(runs)
    for name, run in zip(names, runs, strict=True):
        if run.best is None:
            notes.append(f"{name} has no held-out loss")
        elif run.state not in COMPLETE:
            notes.append(
                f"{name} is {run.state} at step {run.steps:,} of {run.config.max_steps:,}: it does "
                "not count"
            )
    groups = _group(runs, names, metric or "val_loss", notes)
    differences = _differences([group for group in groups if group.scores]) if metric else []
    return Comparison(names, runs, _differing(runs), metric, notes, groups, differences)


def student_t_p_value(t: float, df: int) -> float:
    """Two-sided p-value of Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    cos2, odd = math.cos(theta) ** 2, df % 2
    term = 1.0 if df > 1 else 0.0
    total = term
    for k in range(1, (df - odd) // 2):
        term *= cos2 * (2 * k - 1 + odd) / (2 * k + odd)
        total += term
    if odd:
        inside = 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    else:
        inside = math.sin(theta) * total
    return max(0.0, 1 - inside)


def _comparable_metric(runs: Sequence[RunInfo]) -> tuple[str | None, list[str]]:
    """The metric by which the runs can be compared, and why not by the loss."""
    if not all(run.has_same_text(runs[0]) for run in runs):
        texts = ", ".join(sorted({run.text for run in runs}))
        return None, [f"they were trained on different texts ({texts})"]
    parts = ("val_fraction", "split_by_name", "eval_tokens")
    names = [name for name in parts if len({getattr(run.config, name) for run in runs}) > 1]
    if any(run.config.eval_tokens for run in runs):
        names += ["context_length"] * (len({run.config.context_length for run in runs}) > 1)
    if names:
        fields = ", ".join(names)
        return None, [f"they were evaluated on different parts of the text ({fields} differ)"]
    if len(set(map(_tokenizer, runs))) == 1:
        return "val_loss", []
    note = "their tokenizers differ, so losses per token cannot be compared"
    if any(run.config.eval_tokens for run in runs):
        return None, [f"{note}, and with eval_tokens nor can bits per byte"]
    return "val_bpb", [f"{note}: bits per byte are"]


def _tokenizer(run: RunInfo) -> str:
    return run.tokenizer or run.config.tokenizer


def _group(
    runs: Sequence[RunInfo], names: Sequence[str], metric: str, notes: list[str]
) -> list[Group]:
    """Group the runs by all but their seeds, best group first."""
    found: dict[object, list[tuple[str, RunInfo]]] = {}
    for name, run in zip(names, runs, strict=True):
        learned = [getattr(run.config, field) for field in sorted(LEARNED - {"tokenizer"})]
        text = next(index for index, other in enumerate(runs) if other.has_same_text(run))
        key = (*learned, run.config.global_batch_size, text, _tokenizer(run))
        found.setdefault(key, []).append((name, run))
    groups = []
    for members in found.values():
        scores: dict[int, float] = {}
        for name, run in members:
            if run.config.seed in scores:
                notes.append(f"{name} repeats a configuration and seed: it counts only once")
            elif run.best is not None and run.state in COMPLETE:
                scores[run.config.seed] = run.best[metric]
        name = ", ".join(name for name, _ in members)
        groups.append(Group(name, [run for _, run in members], list(scores.values())))
    return sorted(groups, key=lambda group: group.mean if group.scores else math.inf)


def _differences(groups: Sequence[Group]) -> list[Difference]:
    """Differences of the best group to the others."""
    df = sum(len(group.scores) - 1 for group in groups)
    pairs = len(list(combinations(groups, 2)))
    variance = 0.0
    if df:
        squares = (len(g.scores) - 1 for g in groups)
        spreads = ((g.spread or 0.0) ** 2 for g in groups)
        variance = sum(n * s for n, s in zip(squares, spreads, strict=True)) / df
    found = []
    for worse in groups[1:]:
        better = groups[0]
        error = math.sqrt(variance * (1 / len(better.scores) + 1 / len(worse.scores)))
        size = worse.mean - better.mean
        t = size / error if error else (math.inf if size else 0.0)
        p_value = min(1.0, pairs * student_t_p_value(t, df)) if df else None
        found.append(Difference(better, worse, p_value))
    return found


def _sentence(difference: Difference, what: str) -> str:
    better, worse, p_value = difference.better, difference.worse, difference.p_value
    lower = (
        f"{better.name} has a {what} lower by {difference.size:.4f} "
        f"({difference.size / worse.mean:.1%}) than {worse.name}"
    )
    if p_value is None:
        return (
            f"{lower}. With one seed each, the spread over seeds is unknown and a small difference "
            "may be chance: train both with two or more other seeds (--seed) and compare all runs."
        )
    if difference.is_real:
        return f"{lower}: real, large against the spread of seeds (p = {p_value:.2g})."
    return f"{lower}: no more than seeds differ (p = {p_value:.2g}), so no difference is shown."


def _differing(runs: Sequence[RunInfo]) -> dict[str, list[Any]]:
    """Fields, and versions and devices, that are not the same in all runs."""
    columns: dict[str, list[Any]] = {
        field.name: [getattr(run.config, field.name) for run in runs]
        for field in dataclasses.fields(runs[0].config)
        if field.name not in HIDDEN
    }
    for name in ("device", "dtype", "gptforge", "torch"):
        columns[name] = [str(run.facts.get(name, "unknown")) for run in runs]
    return {name: values for name, values in columns.items() if any(v != values[0] for v in values)}


def _short_names(runs: Sequence[RunInfo]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    count = max(len(run.path.parts) for run in runs)
    for parts in range(1, count + 1):
        names = ["/".join(run.path.parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return names
