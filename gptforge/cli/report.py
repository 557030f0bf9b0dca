"""`gptforge report RUN`: write report.html of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.printable import safe_print


@dataclass(frozen=True)
class ReportArgs:
    """Write report.html into a run folder, as training does at the end: one page, no network."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    out: str = ""
    """File to write instead; empty: report.html in the run folder."""


def main(argv: list[str]) -> int:
    """Write the report and print its path; returns the exit code."""
    args = parse_args(ReportArgs, argv, "gptforge report")
    from gptforge.report.html_report import save_report

    safe_print(save_report(Path(args.run), Path(args.out) if args.out else None).as_posix())
    return 0
