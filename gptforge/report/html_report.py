"""report.html: a run on one page that needs no network."""

import math
from pathlib import Path

from gptforge import __version__
from gptforge.config import Config
from gptforge.errors import install_hint
from gptforge.estimate.formulas import num_params
from gptforge.files import atomic_write
from gptforge.presets import PRESETS, get_preset
from gptforge.printable import printable, printable_text
from gptforge.report.format import format_count, format_duration, format_time
from gptforge.report.html_curves import has_bokeh, interactive_curves, svg_curves
from gptforge.report.metrics import thin_out
from gptforge.report.run_info import RunInfo, read_run, read_samples
from gptforge.report.verdict import verdict
from gptforge.shell import program_name

REPORT = "report.html"
TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SAMPLES, MAX_SAMPLE_CHARS = 12, 4000
MAX_ANOMALIES = 20


def save_report(run_dir: Path, path: Path | None = None, *, pending: str = "") -> Path:
    """Write the report of a run, by default to report.html in its folder; returns the path.

    `pending` are lines that are not in metrics.jsonl yet.

    Raises:
        UserError: if there is no run.
    """
    path = path or run_dir / REPORT
    atomic_write(path, render_report(read_run(run_dir, pending=pending)))
    return path


def render_report(run: RunInfo) -> str:
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
        total_steps=run.steps,
        epochs=run.epochs,
        out_dir=run.path.as_posix(),
        has_val=bool(run.history.evals) or run.config.val_fraction > 0,
        program=program_name(),
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    filters = {"printable": printable, "printable_text": printable_text, "time": format_time}
    environment.filters |= filters
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        run=run,
        title=f"{run.config.preset or 'GPT-2'} on {run.text}",
        tiles=_tiles(run),
        verdict=summary.splitlines(),
        script=Markup(script),
        panels={title: Markup(div) for title, div in panels.items()},
        svg=Markup(svg),
        install_hint=install_hint("report"),
        samples=thin_out(read_samples(run.path / "samples.md"), MAX_SAMPLES),
        max_sample_chars=MAX_SAMPLE_CHARS,
        changed={name: pair for name, pair in fields.items() if pair[0] != pair[1]},
        fields=fields,
        facts=run.facts,
        timeline=_timeline(run),
        version=__version__,
    )


def _tiles(run: RunInfo) -> list[tuple[str, str, str]]:
    """Name, value and remark of the key figures."""
    best, config = run.best, run.config
    tiles = [
        ("Held-out loss", "–", "none held out" if not config.val_fraction else "not evaluated")
    ]
    if best is not None:
        perplexity = f"perplexity {math.exp(min(best['val_loss'], 99)):,.2f}"
        tiles = [
            ("Best held-out loss", f"{best['val_loss']:.4f}", f"nats per token, {perplexity}"),
            ("Bits per byte", f"{best['val_bpb']:.4f}", f"at step {best['step']:,}"),
        ]
    tiles.append(("Steps", f"{run.steps:,}", f"of {config.max_steps:,}"))
    tokens = format_count(run.steps * config.tokens_per_step)
    tiles.append(("Tokens", tokens, f"{run.epochs:,.2f} epochs of {run.text}"))
    if run.seconds is not None:
        speed = f"{format_count(run.history.tok_per_sec)} tokens per second"
        tiles.append(("Training time", format_duration(run.seconds), speed))
    shape = f"{config.n_layer} layers, {config.n_embd} wide"
    tiles.append(("Parameters", format_count(num_params(config.model)), shape))
    return tiles


def _timeline(run: RunInfo) -> list[tuple[str, str]]:
    """Time and description of starts, resumes, anomalies and the end."""
    lines: list[tuple[str, str]] = []
    anomalies = 0
    for event in run.history.rare:
        kind, step = event["event"], printable(event.get("step", 0))
        anomalies += kind == "anomaly"
        if kind == "anomaly" and anomalies > MAX_ANOMALIES:
            continue
        what = {
            "start": "started",
            "resume": f"resumed at step {step}",
            "anomaly": f"anomaly at step {step}: {printable(event.get('kind'))}",
            "end": f"ended at step {step}: {printable(event.get('reason'))}",
        }[kind]
        lines.append((format_time(event.get("time")), what))
    if anomalies > MAX_ANOMALIES:
        lines.append(("", f"and {anomalies - MAX_ANOMALIES:,} more anomalies, in metrics.jsonl"))
    return lines
