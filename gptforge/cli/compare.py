"""`gptforge compare RUN RUN ...`: curves, differences and a verdict that respects noise."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError
from gptforge.printable import safe_print
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
    if not args.json:  # before the picture, which may fail
        safe_print(_text(comparison))
    save_comparison(comparison, picture)
    if args.json:
        print(json.dumps(_to_json(comparison) | {"picture": picture.as_posix()}))
    else:
        safe_print(f"\nPicture: {picture.as_posix()}")
    return 0


def _text(comparison: "Comparison") -> str:
    differing = [["field", *(run.path.as_posix() for run in comparison.runs)]]
    differing += [[name, *values] for name, values in comparison.fields.items()]
    if len(comparison.runs) > len(comparison.fields):
        differing = [list(column) for column in zip(*differing, strict=True)]
        differing[0][0] = "run"
    outcomes = [OUTCOMES, *(_outcome(run.to_json()) for run in comparison.runs)]
    lines = [markdown_table(differing) if comparison.fields else "The configurations are the same."]
    lines += ["", markdown_table(outcomes), "", *(f"note: {note}" for note in comparison.notes)]
    return "\n".join(lines + comparison.verdict)


def _outcome(row: dict[str, Any]) -> list[str]:
    """The cells of a run in the second table."""
    best = [""] * 3
    if row["val_loss"] is not None:
        best = [f"{row['val_loss']:.4f}", f"{row['val_bpb']:.4f}", f"{row['best_step']:,}"]
    steps = [f"{row['step']:,} / {row['max_steps']:,}", format_count(row["tokens"])]
    seconds = "" if row["seconds"] is None else format_duration(row["seconds"])
    return [row["run"], row["state"], *best, *steps, seconds, f"{row['tok_per_sec']:,.0f}"]


def _to_json(comparison: "Comparison") -> dict[str, Any]:
    return vars(comparison) | {
        "runs": [run.to_json() for run in comparison.runs],
        "groups": [
            {
                "name": group.name,
                "runs": [run.path.as_posix() for run in group.runs],
                "scores": group.scores,
                "mean": group.mean if group.scores else None,
                "spread": group.spread,
            }
            for group in comparison.groups
        ],
        "differences": [difference._asdict() for difference in comparison.differences],
        "verdict": comparison.verdict,
    }
