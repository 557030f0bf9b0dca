"""report.html: a run on one page that needs no network."""

import math
from pathlib import Path

from gptforge import __version__
from gptforge.checkpoint.out_dir import REPORT, SAMPLES
from gptforge.config import Config
from gptforge.errors import install_hint
from gptforge.estimate.formulas import num_params
from gptforge.files import atomic_write
from gptforge.presets import PRESETS, get_preset
from gptforge.printable import printable, printable_text
from gptforge.report.format import format_count, format_duration, format_epochs, format_time
from gptforge.report.html_curves import has_bokeh, interactive_curves, svg_curves
from gptforge.report.metrics import thin_out
from gptforge.report.run_info import RunInfo, read_run, read_samples
from gptforge.report.verdict import verdict
from gptforge.shell import program_name, shown

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SAMPLES, MAX_SAMPLE_CHARS = 12, 4000
MAX_ANOMALIES = 20


def save_report(
    run_dir: Path, path: Path | None = None, *, pending: str = "", program: str = ""
) -> Path:
    """Write the report of a run, by default to report.html in its folder; returns the path.

    `pending` are lines that are not in metrics.jsonl yet, and `program` starts the commands that
    the report suggests; by default what started this program.

    Raises:
        UserError: if there is no run.
    """
    path = path or run_dir / REPORT
    atomic_write(path, render_report(read_run(run_dir, pending=pending), program))
    return path


def render_report(run: RunInfo, program: str = "") -> str:
    """The report as one HTML document; all text of the run is escaped by the template engine."""
    from jinja2 import Environment
    from markupsafe import Markup

    script = svg = ""
    panels: dict[str, str] = {}
    if run.history.train or run.history.evals:
        if has_bokeh():
            script, panels = interactive_curves(run.history)
        else:
            svg = svg_curves(run.history)
    preset = get_preset(run.config.preset) if run.config.preset in PRESETS else Config()
    fields = {name: (value, getattr(preset, name)) for name, value in vars(run.config).items()}
    del fields["preset"]
    summary = verdict(
        run.history,
        max_steps=run.config.max_steps,
        out_dir=shown(run.path),
        has_val=bool(run.history.evals) or run.config.val_fraction > 0,
        program=program or program_name(),
    )
    anomalies = [event for event in run.history.rare if event["event"] == "anomaly"]
    hidden = {id(event) for event in anomalies[MAX_ANOMALIES:]}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = (
        *(shown, printable, printable_text),
        *(format_count, format_duration, format_epochs, format_time),
    )
    environment.filters |= {function.__name__: function for function in filters}
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        run=run,
        title=f"{run.config.preset or 'GPT-2'} on {run.text}",
        best=run.history.best,
        config=run.config,
        num_params=num_params(run.config.model),
        exp=math.exp,
        verdict=summary.splitlines(),
        script=Markup(script),
        panels={title: Markup(div) for title, div in panels.items()},
        svg=Markup(svg),
        install_hint=install_hint("report"),
        samples=thin_out(read_samples(run.path / SAMPLES), MAX_SAMPLES),
        max_sample_chars=MAX_SAMPLE_CHARS,
        changed={name: pair for name, pair in fields.items() if pair[0] != pair[1]},
        fields=fields,
        timeline=[event for event in run.history.rare if id(event) not in hidden],
        num_hidden=len(hidden),
        version=__version__,
    )
