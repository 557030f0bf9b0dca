"""Blank curves and report.html, and short samples: they take longer than a small run."""

import base64
from pathlib import Path
from typing import Any

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)

SAMPLE_TOKENS = 40
"""Longer than the context of the debug preset, which then shifts."""


class BlankFigure:
    """A figure, as far as a run needs one."""

    def savefig(self, path: Path, **_: Any) -> None:
        path.write_bytes(PNG)


def blank_curves(*_: Any, **__: Any) -> BlankFigure:
    return BlankFigure()


def blank_report(*_: Any) -> str:
    return "<!DOCTYPE html>"


def use_blank_pictures() -> None:
    """In this process, which is a child process of a test, from now on."""
    from gptforge.report import curves, html_report

    curves.plot_curves, html_report.render_report = blank_curves, blank_report


def use_short_samples() -> None:
    """In this process, too."""
    from gptforge.training import trainer

    trainer.SAMPLE_TOKENS = SAMPLE_TOKENS
