"""The curves of report.html: interactive with Bokeh, else the picture of `curves` as SVG."""

import importlib.util
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gptforge.report import curves
from gptforge.report.metrics import Event, History, series, thin_out

if TYPE_CHECKING:
    from bokeh.models import ColumnDataSource, GlyphRenderer, HoverTool
    from bokeh.plotting import figure

MAX_POINTS = {"bokeh": 4000, "svg": 1000}
"""Train events that are drawn; more would only make the page larger."""


def has_bokeh() -> bool:
    """Whether the curves can be interactive."""
    return importlib.util.find_spec("bokeh") is not None


def interactive_curves(history: History) -> tuple[str, dict[str, str]]:
    """Draw the curves with Bokeh: zooming one zooms all, and pointing at them shows values.

    Returns:
        `<script>` elements, which include Bokeh itself, and the HTML of each panel by its title.
    """
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource, CrosshairTool, Span
    from bokeh.resources import Resources

    train = thin_out(history.train, MAX_POINTS["bokeh"])
    names = ("loss", *(name for name, *_ in curves.PANELS))
    columns = {name: np.array(series(train, name)) for name in ("step", *names)}
    if len(train) > 1:
        columns["tok_per_sec"][0] = math.nan  # it includes compilation and warmup
    is_noisy = len(train) >= curves.SMOOTH_FROM
    for name in names:
        has_mean = is_noisy and name != "lr"
        columns[f"mean_{name}"] = curves.running_mean(columns[name]) if has_mean else columns[name]
    source = ColumnDataSource(columns)
    is_log = curves.needs_log_scale(curves.finite_losses(history))
    title = f"loss, nats per token{', logarithmic' if is_log else ''}"
    panels = {title: _loss_panel(source, history.scored_evals, is_log=is_log, is_noisy=is_noisy)}
    for name, label, color, number_format in curves.PANELS:
        panel = _panel(height=190, x_range=panels[title].x_range, toolbar_location=None)
        _draw(panel, source, name, label, color, number_format, is_noisy=is_noisy and name != "lr")
        top = curves.axis_top(history, name) or 1.0
        panel.y_range.update(start=0, end=top, bounds=(0, None))
        panels[label] = panel
    line = Span(dimension="height", line_color=curves.MUTED_COLOR, line_dash="dotted")
    for panel in panels.values():
        panel.add_tools(CrosshairTool(overlay=line, visible=False))
    script, divs = components(panels)
    # Of Bokeh's files, only that with lines, points and tools.
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return library + script, divs


def svg_curves(history: History) -> str:
    """Draw the curves as SVG whose colors are the page's."""
    import matplotlib as mpl

    thin = replace(history, train=thin_out(history.train, MAX_POINTS["svg"]))
    out = io.BytesIO()
    with curves.default_style():
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "gptforge"})
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure = curves.plot_curves(thin, title="")
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    colors = {curves.TEXT_COLOR: "--text", curves.MUTED_COLOR: "--muted", "#e8eaee": "--line"}
    for color, variable in colors.items():
        svg = svg.replace(color, f"var({variable})")
    # The page sets the size.
    return re.sub(r'(width|height)="[\d.]+pt"', "", svg, count=2)


def _panel(**options: Any) -> "figure":
    """An empty figure in which dragging zooms into steps."""
    from bokeh.models import NumeralTickFormatter
    from bokeh.plotting import figure

    panel = figure(
        sizing_mode="stretch_width", tools="xbox_zoom,xpan,reset", active_drag="xbox_zoom",
        background_fill_color=None, border_fill_color=None, outline_line_color=None,
        min_border_left=56, min_border_right=12, **options,
    )  # fmt: skip
    panel.toolbar.update(logo=None, autohide=True)
    panel.xgrid.visible = False
    # Colors are CSS variables of the page.
    for axis in (panel.xaxis, panel.yaxis):
        axis.update(minor_tick_line_color=None, major_label_text_font="system-ui, sans-serif")
        axis.formatter = NumeralTickFormatter(format="0.[0000]a")
    return panel


def _draw(
    panel: "figure", source: "ColumnDataSource", name: str, label: str, color: str,
    number_format: str, *, is_noisy: bool,
) -> None:  # fmt: skip
    """Draw one column over the steps, faintly behind its running mean if it is noisy."""
    style = {"source": source, "color": color}
    if is_noisy:
        panel.line("step", name, line_width=0.8, alpha=0.35, **style)
    line = panel.line("step", f"mean_{name}", line_width=2, **style)
    if len(source.data["step"]) == 1:
        panel.scatter("step", name, size=7, **style)
    columns = {label: name} | ({"running mean": f"mean_{name}"} if is_noisy else {})
    panel.add_tools(_hover(line, columns, number_format))


def _hover(
    renderer: "GlyphRenderer[Any]", columns: Mapping[str, str], number_format: str,
    attachment: str = "right",
) -> "HoverTool":  # fmt: skip
    """Values where the mouse points, in the page's colors: CSS variables reach into Bokeh."""
    from bokeh.models import HoverTool

    style = "background:var(--sheet);color:var(--text);margin:-5px;padding:6px 10px;font-size:13px"
    rows = ["step <b>@step{0,0}</b>"]
    rows += [f"{label} <b>@{name}{{{number_format}}}</b>" for label, name in columns.items()]
    return HoverTool(
        renderers=[renderer], mode="vline", attachment=attachment, visible=False,
        tooltips=f'<div style="{style}">{"<br>".join(rows)}</div>',
        formatters={f"@{name}": "printf" for name in columns.values()},
    )  # fmt: skip


def _loss_panel(
    source: "ColumnDataSource", evals: Sequence[Event], *, is_log: bool, is_noisy: bool
) -> "figure":
    from bokeh.models import ColumnDataSource

    scale: dict[str, Any] = {"y_axis_type": "log" if is_log else "linear"}
    panel = _panel(height=380, name="losses", toolbar_location="above", **scale)
    _draw(panel, source, "loss", "training", curves.TRAIN_COLOR, "%.4f", is_noisy=is_noisy)
    points = ColumnDataSource(
        {name: np.array(series(evals, name)) for name in ("step", "val_loss", "val_bpb")}
    )
    style = {"source": points, "color": curves.VAL_COLOR}
    panel.line("step", "val_loss", line_width=2, **style)
    dots = panel.scatter("step", "val_loss", size=6 if len(evals) <= 100 else 3, **style)
    columns = {"held out": "val_loss", "bits per byte": "val_bpb"}
    # On the other side than the training loss.
    panel.add_tools(_hover(dots, columns, "%.4f", attachment="left"))
    if is_log:
        panel.yaxis.ticker.mantissas = [1, 2, 5]
    return panel
