"""A run folder as an object: metrics, best checkpoint, model, curves."""

import base64
import html
import io
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptforge.builders.load_model import load
from gptforge.checkpoint.format import read_config, read_state, step_from_path
from gptforge.checkpoint.out_dir import METRICS, read_metrics_lines
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.inference.language_model import LanguageModel
from gptforge.report.curves import default_style, plot_curves
from gptforge.report.metrics import Event, History, read_history
from gptforge.report.run_info import check_run_dir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INLINE_DPI = 75


class Best(NamedTuple):
    """The checkpoint with the lowest loss.

    The loss is in nats per token: after training, that on all held-out text, which `gptforge eval`
    prints; before, or if that took too long, that of an evaluation during training. Without
    held-out text, it is the recent training loss.
    """

    step: int
    loss: float
    path: Path


class Run:
    """The run in a folder, finished or in progress; a UserError if there is none.

    Files are read when needed. Notebooks show its curves.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        check_run_dir(self.path)
        # Absolute, so that the run is still found after os.chdir, or %cd in a notebook.
        self._dir = self.path.absolute()
        self._store = CheckpointStore(self._dir / "checkpoints")

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        return read_config(self._dir, with_model=False)

    @property
    def metrics(self) -> list[Event]:
        """The events of metrics.jsonl in order, for instance for `pandas.DataFrame`."""
        lines = read_metrics_lines(self._dir / METRICS)
        # The last line may still be incomplete.
        return [json.loads(line) for line in lines if line.endswith(b"}\n")]

    @property
    def best(self) -> Best | None:
        """The best checkpoint; None before the first evaluation."""
        best, final = self._store.read_link("best"), self._history.final
        # A run that stops before its first evaluation evaluates its last checkpoint.
        path = best or self._store.read_link("last")
        if path and final and final["best_step"] == step_from_path(path):
            return Best(final["best_step"], final["final_val_loss"], path)
        if best is None:
            return None
        return Best(step_from_path(best), read_state(best)["progress"]["best_loss"], best)

    @property
    def _history(self) -> History:
        return read_history(self._dir / METRICS)

    @cached_property
    def model(self) -> LanguageModel:
        """The best model, as `gptforge.load` gives it; loaded once."""
        return load(self._dir)

    def plot(self) -> "Figure":
        """Draw losses, learning rate, gradient norm and speed."""
        figure = plot_curves(self._history, title=self.path.name)
        # IPython looks for this method to show an object.
        figure._repr_png_ = lambda: _png(figure)  # type: ignore[attr-defined]
        return figure

    def __repr__(self) -> str:
        return f"Run({', '.join(self._summary().values())})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._summary().items()
        )
        image = base64.b64encode(_png(self.plot())).decode()
        return f"<table>{rows}</table><img alt='curves' src='data:image/png;base64,{image}'>"

    def _summary(self) -> dict[str, str]:
        last, best = self._store.read_link("last"), self.best
        step = step_from_path(last) if last else 0
        summary = {"run": self.path.as_posix(), "saved": f"step {step} of {self.config.max_steps}"}
        return summary | (
            {"best": f"loss {best.loss:.4f} nats per token at step {best.step}"} if best else {}
        )


@default_style()
def _png(figure: "Figure") -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=INLINE_DPI)
    return data.getvalue()
