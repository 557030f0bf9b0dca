"""`gptforge runs`, `report` and `compare`: what was trained, and what is best."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError
from gptforge.printable import safe_print
from gptforge.report.format import format_count, format_duration, format_time, markdown_table

if TYPE_CHECKING:
    from gptforge.report.comparison import Comparison

HEADER = ("run", "state", "text", "held-out loss", "step", "time", "size", "last change")
DAMAGED = "damaged"
PICTURES = (".png", ".svg", ".pdf")
PAGES = (".html", ".htm")
OUTCOMES = (
    *("run", "state", "held-out loss", "bits per byte", "best step", "steps", "tokens", "time"),
    "tokens/s",
)


@dataclass(frozen=True)
class RunsArgs:
    """List the training runs in a folder, newest first: state, best held-out loss, steps, time."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DIR]")] = "runs"
    """Folder that contains run folders, also in subfolders."""
    json: bool = False
    """Print a JSON list with an object for each run."""


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html into a run folder, as training does at the end: one page, no network."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: str = ""
    """File to write instead, .html; empty: report.html in the run folder."""


@dataclass(frozen=True)
class CompareArgs:
    """Compare training runs: their curves, where their configurations differ, and which is better.

    Runs that differ only by seed are grouped; a difference counts as real only if it is large
    compared with the spread over seeds. Runs whose --max_steps was raised are separate."""

    runs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint="(required)"),
    ]
    """Run folders, two or more."""
    out: str = "compare.png"
    """File for the picture: .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> None:
    """Print the table."""
    args = parse_args(RunsArgs, argv, "gptforge runs")
    from gptforge.report.run_info import SWEEP_DATA, find_runs, subfolders

    folder = Path(args.folder)
    if not folder.is_dir():
        hint = "train first, or give the folder of your runs: gptforge runs DIR"
        raise UserError(f"{args.folder}: there is no such folder: {hint}")
    # A subfolder without any run gets a row that says so.
    paths = find_runs(folder, depth=0)
    for sub in [] if paths else subfolders(folder):
        paths += find_runs(sub) or ([] if sub.name == SWEEP_DATA else [sub])
    rows = sorted(map(_row, paths), key=lambda row: -row["modified"])
    if args.json:
        print(json.dumps(rows))
    elif rows:
        safe_print(markdown_table([HEADER, *map(_cells, rows)]))
        for row in rows:
            if row["state"] == DAMAGED:
                safe_print(f"note: {row['problem']}")
    else:
        safe_print(f"No runs in {args.folder}.")


def report_main(argv: list[str]) -> None:
    """Write the report and print its path."""
    args = parse_args(ReportArgs, argv, "gptforge report")
    if args.out and Path(args.out).suffix.lower() not in PAGES:
        raise UserError(f"--out {args.out}: must end in .html")  # or it may replace another file
    from gptforge.report.html_report import save_report

    safe_print(save_report(Path(args.run), Path(args.out) if args.out else None).as_posix())


def _row(path: Path) -> dict[str, Any]:
    """The facts of a run, or what is wrong with its folder."""
    from gptforge.checkpoint.format import CONFIG, MODEL
    from gptforge.report.run_info import disk_bytes, find_runs, read_run

    size = {"bytes": disk_bytes(path)}
    try:
        return read_run(path).to_json() | size
    except (UserError, OSError) as error:
        state = DAMAGED if find_runs(path, depth=0) else "no run"
        if (path / CONFIG).is_file() and (path / MODEL).is_file():
            state = "model"  # imported, or a checkpoint that was copied
        facts = {"run": path.as_posix(), "state": state, "problem": str(error)}
        return facts | {"modified": path.stat().st_mtime} | size


def _cells(row: dict[str, Any]) -> list[str]:
    size, changed = f"{row['bytes'] / 1e6:,.1f} MB", format_time(row["modified"])
    if "problem" in row:
        return [row["run"], row["state"], *[""] * 4, size, changed]
    loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f} at {row['best_step']:,}"
    if row["is_val_subset"]:
        loss += f", over {row['val_tokens']:,} tokens"
    seconds = "" if row["seconds"] is None else format_duration(row["seconds"])
    steps = f"{row['step']:,} / {row['max_steps']:,}"
    return [row["run"], row["state"], row["text"], loss, steps, seconds, size, changed]


def compare_main(argv: list[str]) -> None:
    """Print the comparison and draw the picture."""
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
    from gptforge.report.comparison_plot import plot_comparison
    from gptforge.report.curves import save_figure
    from gptforge.report.run_info import read_run

    comparison = compare([read_run(path) for path in paths])
    if not args.json:  # before the picture, which may fail
        safe_print(_describe(comparison))
    save_figure(plot_comparison(comparison), picture)
    if args.json:
        print(json.dumps(_as_json(comparison) | {"picture": picture.as_posix()}))
    else:
        safe_print(f"\nPicture: {picture.as_posix()}")


def _describe(comparison: "Comparison") -> str:
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


def _as_json(comparison: "Comparison") -> dict[str, Any]:
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
