"""Experiment trackers: a copy of a run's events in TensorBoard, W&B, Trackio or MLflow.

Each tracker works in a thread of its own, so that a slow network delays no step and an error ends
no run. What was sent is recorded in the run folder: a run that resumes continues the same run of
the tracker, and sends no step twice.
"""

import html
import importlib
import json
import logging
import os
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from gptforge import files
from gptforge.checkpoint.out_dir import TRACKING
from gptforge.config import Config
from gptforge.errors import error_reason, is_failure

PROJECT = "gptforge"
MAX_WAIT_SECONDS = 60.0  # at the end of a run, until everything is sent

Values = Mapping[str, float | str | Path]  # metrics, texts and images by name
Queue = SimpleQueue[tuple[str, int, Values] | str]  # events, and the reason for the end of the run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """A run in an experiment tracker; its functions, and those that open it, may raise anything."""

    id: str
    hint: str  # how to see it
    log: Callable[[int, Values], None]  # adds values of a step
    finish: Callable[[str], object]
    """Sends what is left, given the reason of the end event, or "failed"."""


def open_tensorboard(id: str, folder: Path, config: Config) -> Tracker:
    """Event files."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(folder)

    def log(step: int, values: Values) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                writer.add_text(name, textwrap.indent(value, "    "), step)
            elif isinstance(value, Path):
                writer.add_image(name, imread(value), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    if not id:
        log(0, {"config": "\n".join(f"{name} = {value}" for name, value in vars(config).items())})
    return Tracker("1", f"tensorboard --logdir {folder}", log, lambda reason: writer.close())


def open_wandb(id: str, folder: Path, config: Config) -> Tracker:
    """Weights & Biases: online if the user is logged in, else offline; never asks for a key."""
    import wandb

    settings = wandb.setup().settings
    mode = settings.mode
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
        logger.info("wandb: no API key, so the run is kept offline; wandb login stores a key")
    run: Any = wandb.init(
        project=settings.project or PROJECT,
        name=folder.parents[1].name,
        id=id or uuid.uuid4().hex[:8],
        resume="allow",
        mode=mode,
        config=vars(config),
        dir=folder.parent,  # wandb adds its name
        settings=wandb.Settings(console="off"),  # its capture disturbs the progress bar
    )
    run.define_metric("*", step_metric="step")

    def log(step: int, values: Values) -> None:
        row = _convert(
            {"step": step, **values},
            lambda text: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False),
            lambda path: wandb.Image(str(path)),
        )
        # A resumed run drops rows that are not after its last one, and step N is made after the
        # evaluation of N steps.
        run.log(row, step=2 * step + ("train/loss" in row))

    hint = f"wandb sync {folder}" if mode == "offline" else str(run.url)
    return Tracker(run.id, hint, log, lambda reason: run.finish(int(reason == "failed")))


def open_trackio(id: str, folder: Path, config: Config) -> Tracker:
    """Trackio: a database in the run folder, or where its environment variables say."""
    import trackio

    id = id or f"{folder.parents[1].name}-{uuid.uuid4().hex[:8]}"
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run: Any = trackio.init(project, id, resume="allow", config=dict(vars(config)), embed=False)

    def log(step: int, values: Values) -> None:
        row = _convert(
            values, lambda text: trackio.Markdown(f"~~~text\n{text}\n~~~"), trackio.Image
        )
        run.log(row, step)

    hint = f"TRACKIO_DIR={trackio.utils.TRACKIO_DIR} trackio show"
    return Tracker(id, hint, log, lambda reason: run.finish())


def open_mlflow(id: str, folder: Path, config: Config) -> Tracker:
    """MLflow: the server of MLFLOW_TRACKING_URI, else a database in the run folder."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    server = os.environ.get("MLFLOW_TRACKING_URI")
    uri = server or f"sqlite:///{(folder / 'mlflow.db').as_posix()}"
    if not server:
        (folder / "mlflow.db").touch()  # SQLite's own mode is 0644, whatever the umask allows
    client: Any = MlflowClient(uri)
    if id:
        client.update_run(id, status="RUNNING")
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        artifacts = None if server else (folder / "artifacts").as_uri()
        old = client.get_experiment_by_name(name)
        experiment = old.experiment_id if old else client.create_experiment(name, artifacts)
        id = client.create_run(experiment, run_name=folder.parents[1].name).info.run_id
        for name, value in vars(config).items():
            client.log_param(id, name, value)

    def log(step: int, values: Values) -> None:
        metrics = []
        for name, value in values.items():
            if isinstance(value, str):
                client.log_text(id, value, f"{name}/step-{step:06}.txt")
            elif isinstance(value, Path):
                client.log_artifact(id, str(value))
            else:
                metrics.append(Metric(name, value, int(1000 * time.time()), step))
        client.log_batch(id, metrics)

    def finish(reason: str) -> None:
        status = {"failed": "FAILED", "interrupted": "KILLED", "terminated": "KILLED"}
        client.set_terminated(id, status.get(reason, "FINISHED"))

    return Tracker(id, f"mlflow ui --backend-store-uri {uri}", log, finish)


OPENERS: dict[str, Callable[[str, Path, Config], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "trackio": open_trackio,
    "mlflow": open_mlflow,
}


def _convert(values: Values, text: Callable[[str], Any], image: Any) -> dict[str, Any]:
    """Wrap texts and paths of images in a tracker's own types."""
    types = {str: text, type(Path()): image}
    return {name: types.get(type(value), lambda v: v)(value) for name, value in values.items()}


class Trackers:
    """Sends events of a run to its trackers while entered, and until `finish`."""

    def __init__(self, names: Sequence[str], config: Config) -> None:
        self._config, self._folder = config, Path(config.out_dir).absolute() / TRACKING
        self._queues: dict[str, Queue] = {name: Queue() for name in names}
        self._threads: list[threading.Thread] = []
        self._failed: set[str] = set()
        if "trackio" in names:  # which reads this when imported
            os.environ.setdefault("TRACKIO_DIR", str(self._folder / "trackio"))
        for name in ["matplotlib.figure", *names] if names else []:
            with self._warn_once(name):
                # Not in the threads: they would see what another one has imported in part.
                importlib.import_module(name)

    def __enter__(self) -> Self:
        for name in self._queues:
            thread = threading.Thread(target=self._send, args=(name,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # A second Ctrl-C, which is no Exception, quits at once.
        if error is not None and issubclass(error, Exception):
            self.finish("failed", 5.0)  # other ranks are waiting

    def log(self, event: str, step: int, values: Values) -> None:
        """Send values of a step, unless an event of this kind was already sent for it."""
        for queue in self._queues.values():
            queue.put((event, step, {f"{event}/{name}": values[name] for name in values}))

    def finish(self, reason: str, seconds: float = MAX_WAIT_SECONDS) -> None:
        """Wait for a time until everything is sent; `reason` as in `Tracker.finish`."""
        deadline = time.monotonic() + seconds
        for queue in self._queues.values():
            queue.put(reason)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning(f"warning: {thread.name}: not all was sent in {seconds:g} seconds")

    def _send(self, name: str) -> None:
        folder, path = self._folder / name, self._folder / f"{name}.json"
        record: dict[str, Any] = {"id": "", "sent": {}}
        tracker: Tracker | None = None
        with self._warn_once(name):
            folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                record = json.loads(files.read_text(path, follow_symlinks=False))
            tracker = OPENERS[name](record["id"], folder, self._config)
            record["id"] = tracker.id
            logger.info(f"{name}: {tracker.hint}")
        while not isinstance(item := self._queues[name].get(), str):
            event, step, values = item
            with self._warn_once(name):
                if tracker is not None and step > record["sent"].get(event, -1):
                    record["sent"][event] = step
                    # Gone if the run folder was moved; the next save makes that again.
                    self._folder.mkdir(exist_ok=True)
                    # First: if the process is killed in between, nothing is sent twice.
                    files.atomic_write(path, json.dumps(record) + "\n")
                    tracker.log(step, values)
        with self._warn_once(name):
            if tracker is not None:
                tracker.finish(item)

    @contextmanager
    def _warn_once(self, name: str) -> Iterator[None]:
        """Turn the first error of a tracker into a warning, and ignore the others."""
        try:
            yield
        except BaseException as error:
            # A signal raises no SystemExit; a tracker that calls sys.exit must neither end the run
            # nor its own thread silently.
            if not (is_failure(error) or isinstance(error, SystemExit)):
                raise
            if name not in self._failed:
                logger.warning(f"warning: {name}: {error_reason(error)}; training continues")
            self._failed.add(name)
