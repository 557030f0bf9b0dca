"""`gptforge runs [DIR]`: a table of training runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError
from gptforge.printable import safe_print
from gptforge.report.format import format_duration, format_time, markdown_table

HEADER = ("run", "state", "text", "held-out loss", "step", "time", "size", "last change")
DAMAGED = "damaged"


@dataclass(frozen=True)
class RunsArgs:
    """List the training runs in a folder, newest first: state, best held-out loss, steps, time."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[DIR]")] = "runs"
    """Folder of run folders, which may be nested, as those of a sweep are."""
    json: bool = False
    """Print a JSON list with an object for each run."""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    args = parse_args(RunsArgs, argv, "gptforge runs")
    from gptforge.report.run_info import find_runs, subfolders

    folder = Path(args.folder)
    if not folder.is_dir():
        hint = "train first, or give the folder of your runs: gptforge runs DIR"
        raise UserError(f"{args.folder}: there is no such folder: {hint}")
    # A subfolder without any run gets a row that says so.
    paths = find_runs(folder, depth=0)
    paths = paths or [path for sub in subfolders(folder) for path in find_runs(sub) or [sub]]
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
    return 0


def _row(path: Path) -> dict[str, Any]:
    """The facts of a run, or what is wrong with its folder."""
    from gptforge.checkpoint.format import CONFIG
    from gptforge.report.run_info import disk_bytes, read_run

    size = {"bytes": disk_bytes(path)}
    try:
        return read_run(path).to_json() | size
    except (UserError, OSError) as error:
        state = DAMAGED if (path / CONFIG).is_file() else "no run"
        facts = {"run": path.as_posix(), "state": state, "problem": str(error)}
        return facts | {"modified": path.stat().st_mtime} | size


def _cells(row: dict[str, Any]) -> list[str]:
    size, changed = f"{row['bytes'] / 1e6:,.1f} MB", format_time(row["modified"])
    if "problem" in row:
        return [row["run"], row["state"], *[""] * 4, size, changed]
    loss = "" if row["val_loss"] is None else f"{row['val_loss']:.4f} at {row['best_step']:,}"
    seconds = "" if row["seconds"] is None else format_duration(row["seconds"])
    steps = f"{row['step']:,} / {row['max_steps']:,}"
    return [row["run"], row["state"], row["text"], loss, steps, seconds, size, changed]
