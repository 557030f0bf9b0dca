"""Blank curves and report.html: they take longer than a small run."""

from typing import Any

from matplotlib.figure import Figure


def blank_curves(*_: Any, **__: Any) -> Figure:
    return Figure(figsize=(1, 1))


def blank_report(_: Any) -> str:
    return "<!DOCTYPE html>"


def use_blank_pictures() -> None:
    """In this process, which is a child process of a test, from now on."""
    from gptforge.report import curves, html_report

    curves.plot_curves, html_report.render_report = blank_curves, blank_report
