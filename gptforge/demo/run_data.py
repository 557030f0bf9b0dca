"""What the page shows of a run: its models, and as JSON its checkpoints, metrics and samples."""

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gptforge.checkpoint.format import read_config
from gptforge.checkpoint.out_dir import METRICS, SAMPLES
from gptforge.checkpoint.store import CheckpointStore
from gptforge.errors import UserError
from gptforge.files import real_path
from gptforge.inference.language_model import LanguageModel
from gptforge.report.format import format_duration
from gptforge.report.metrics import History, read_history, thin_out
from gptforge.report.run_info import read_samples

MAX_LOADED_MODELS = 2  # as many as a page compares
MAX_POINTS = 600  # of a curve
MAX_SAMPLES = 60
CURVES = {"train": ("step", "loss", "lr", "norm", "tok_per_sec"), "evals": ("step", "val_loss")}


class ModelCache:
    """Models of a run by checkpoint, loaded on first use; the least recently used is dropped."""

    def __init__(self, load: Callable[[str], LanguageModel], run: str) -> None:
        self._load = functools.lru_cache(MAX_LOADED_MODELS)(load)
        self._run, self._store = run, CheckpointStore(Path(run) / "checkpoints")
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The checkpoints: best and last, then the steps, newest first."""
        links = [link for link in ("best", "last") if self._store.read_link(link)]
        steps = [path.name for path in reversed(self._store.checkpoints())]
        return [*links, *steps] or [Path(self._run).name]

    def target(self, name: str) -> str:
        """The checkpoint that `best` or `last` is now; other names stay as they are."""
        path = self._store.read_link(name)
        return path.name if path else name

    def get(self, name: str) -> LanguageModel:
        """The model of one of `names`; a UserError if it is gone or damaged."""
        if name not in self.names():
            raise UserError(f"there is no checkpoint {name} here any more: choose another")
        with self._lock:  # or two requests would load the same model
            while True:
                target = self.target(name)
                path = self._store.folder / target
                try:
                    return self._load(str(real_path(path) if path.is_dir() else Path(self._run)))
                except UserError:
                    if self.target(name) == target:
                        raise
                    # A run that trains has replaced `best` or `last`, and deleted what it was.


def routes(models: ModelCache, run_dir: Path, *, about: Mapping[str, Any]) -> list[Route]:
    """`run.json`, with the fields of `about`; pages poll it: built when a file has changed."""

    @functools.lru_cache(maxsize=1)
    def render(_: str, checkpoints: tuple[tuple[str, str], ...]) -> str:
        samples = thin_out(read_samples(run_dir / SAMPLES), MAX_SAMPLES)
        max_steps = 0
        with suppress(UserError):  # of a model without a run
            max_steps = read_config(run_dir, with_model=False).max_steps  # a resume may raise it
        metrics = run_metrics(read_history(run_dir / METRICS), checkpoints, max_steps=max_steps)
        return json.dumps({**about, **metrics, "samples": samples})

    def get_run(request: Request) -> Response:
        checkpoints = tuple((name, models.target(name)) for name in models.names())
        version = "-".join(_version(run_dir / name) for name in (METRICS, SAMPLES))
        etag = f'"{version}-{abs(hash(checkpoints)):x}"'
        headers = {"etag": etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        content = render(version, checkpoints)
        return Response(content, media_type="application/json", headers=headers)

    return [Route("/run.json", get_run, methods=["GET"])]


def run_metrics(
    history: History, checkpoints: Sequence[tuple[str, str]], *, max_steps: int
) -> dict[str, Any]:
    """Labels of the checkpoints, tiles of key figures and curves.

    `checkpoints` are the name and folder of each, which differ for `best` and `last`.
    """
    losses = {f"step-{e['step']:06}": float(e["val_loss"]) for e in history.scored_evals}
    folders = dict(checkpoints)
    evaluated = folders.get("best") or folders.get("last") or ""
    # It has another name than its step if it is of steps that were dropped and made again.
    if (best := history.best) and evaluated.startswith(f"step-{best['step']:06}"):
        losses[evaluated] = float(best["val_loss"])
    events = {"train": thin_out(history.train, MAX_POINTS), "evals": history.scored_evals}
    links = {folder for name, folder in checkpoints if name != folder}
    listed = [(name, folder) for name, folder in checkpoints if name not in links]
    return {
        "checkpoints": [[name, _label(name, folder, losses)] for name, folder in listed],
        "tiles": _tiles(history, max_steps) if history.train else [],
        "progress": min(1.0, history.steps / max(1, max_steps)),
        **{
            kind: {name: [_short(event[name]) for event in events[kind]] for name in names}
            for kind, names in CURVES.items()
        },
    }


def _label(name: str, folder: str, losses: Mapping[str, float]) -> str:
    """'best · step 1,500 · val loss 1.423'."""
    number = folder.removeprefix("step-").partition(".")[0]
    if not number.isdecimal():
        return name
    step = f"step {int(number):,}"
    loss = losses.get(folder)
    parts = [*([] if name == folder else [name]), step, *([f"val loss {loss:.3f}"] if loss else [])]
    return " · ".join(parts)


def _tiles(history: History, max_steps: int) -> list[tuple[str, str, str]]:
    """Name, value and note of each."""
    last, step = history.train[-1], history.steps
    tiles = [("step", f"{step:,}", f"of {max_steps:,}")]
    if best := history.best:
        # Runs of earlier versions do not say how much text the loss is over.
        tokens = f"{best['val_tokens']:,} held-out tokens" if best.get("val_tokens") else ""
        tiles += [
            ("best val loss", f"{best['val_loss']:.4f}", f"nats per token, step {best['step']:,}"),
            ("bits per byte", f"{best['val_bpb']:.4f}", tokens or "held-out text"),
        ]
    tiles.append(("tokens per second", f"{float(last['tok_per_sec'] or 0):,.0f}", "training"))
    if step < max_steps and not history.end:
        seconds = (max_steps - step) * float(last["dt_ms"] or 0) / 1e3
        tiles.append(("time left", format_duration(seconds), "about"))
    return tiles


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _version(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
