"""`gptforge compare RUN RUN ...`: curves, differences and a verdict that respects noise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError
from gptforge.printable import printable, safe_print
from gptforge.report.format import format_count, format_duration, markdown_table

if TYPE_CHECKING:
    from gptforge.report.comparison import Comparison

PICTURES = (".png", ".svg", ".pdf")
OUTCOMES = (
    *("run", "state", "held-out loss", "bits per byte", "best step", "steps", "tokens", "time"),
    "tokens/s",
)


@dataclass(frozen=True)
class CompareArgs:
    """Compare training runs: their curves, where their configurations differ, and which is better.

    Runs that differ by the seed alone are grouped; a difference counts as real only if it is large
    against the spread of seeds."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN RUN ...")]
    """Run folders, two or more."""
    out: str = "compare.png"
    """File for the picture: .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Print the comparison and draw the picture; returns the exit code."""
    args = parse_args(CompareArgs, argv, "gptforge compare")
    paths = list(dict.fromkeys(map(Path, args.runs)))
    picture = Path(args.out)
    if len(paths) < 2:
        raise UserError("compare takes two or more different runs: gptforge compare RUN RUN")
    if picture.suffix.lower() not in PICTURES:
        raise UserError(f"--out {args.out}: must end in {', '.join(PICTURES)}")
    if not picture.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {picture.parent.as_posix()}")
    from gptforge.report.comparison import compare
    from gptforge.report.comparison_plot import save_comparison
    from gptforge.report.run_info import read_run

    comparison = compare([read_run(path) for path in paths])
    save_comparison(comparison, picture)
    if args.json:
        print(json.dumps(_to_json(comparison) | {"picture": picture.as_posix()}))
    else:
        safe_print(_text(comparison))
        safe_print(f"\nPicture: {picture.as_posix()}")
    return 0


def _text(comparison: "Comparison") -> str:
    differing = [["run", *comparison.fields]]
    differing += [
        [name, *(printable(values[index]) for values in comparison.fields.values())]
        for index, name in enumerate(comparison.names)
    ]
    outcomes = [list(OUTCOMES)]
    for name, run in zip(comparison.names, comparison.runs, strict=True):
        row = run.to_json()
        best = ["", "", ""]
        if run.best is not None:
            best = [f"{row['val_loss']:.4f}", f"{row['val_bpb']:.4f}", f"{row['best_step']:,}"]
        steps = [f"{row['step']:,} / {row['max_steps']:,}", format_count(row["tokens"])]
        seconds = "" if row["seconds"] is None else format_duration(row["seconds"])
        outcomes.append(
            [name, run.state, *best, *steps, seconds, f"{row['tok_per_sec'] or 0:,.0f}"]
        )
    tables = [markdown_table(rows) for rows in (differing, outcomes)]
    if not comparison.fields:
        tables[0] = "The configurations are the same."
    notes = [f"note: {note}" for note in comparison.notes]
    return "\n".join([*tables[:1], "", *tables[1:], "", *notes, *comparison.verdict])


def _to_json(comparison: "Comparison") -> dict[str, Any]:
    groups = list(comparison.groups)
    runs = []
    for index, run in enumerate(comparison.runs):
        values = {name: column[index] for name, column in comparison.fields.items()}
        group = next(i for i, group in enumerate(groups) if run in group.runs)
        runs.append(run.to_json() | {"group": group, "fields": values})
    return {
        "metric": comparison.metric,
        "notes": list(comparison.notes),
        "runs": runs,
        "groups": [
            {
                "name": group.name,
                "scores": list(group.scores),
                "mean": group.mean if group.scores else None,
                "spread": group.spread,
            }
            for group in groups
        ],
        "differences": [
            {
                "better": groups.index(difference.better),
                "worse": groups.index(difference.worse),
                "difference": difference.size,
                "p_value": difference.p_value,
                "is_real": difference.is_real if difference.p_value is not None else None,
            }
            for difference in comparison.differences
        ],
        "verdict": comparison.verdict,
    }
