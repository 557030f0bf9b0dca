"""Each tracker with its own library, offline; what it stored is read back by that library."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gptforge.config import Config
from gptforge.report.curves import save_curves
from gptforge.report.metrics import History
from gptforge.report.trackers import Trackers

TEXT = "O <Romeo>!\n\n  *wherefore*"
STEPS = 8


@pytest.fixture(autouse=True)
def blank_pictures() -> None:
    """Not here: they are what is tested."""


@dataclass
class Stored:
    """What a reader finds."""

    runs: int
    loss: list[tuple[int, float]]
    val_loss: list[tuple[int, float]]
    config: str
    text: str
    has_image: bool


def read_tensorboard(folder: Path) -> Stored:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    texts = {
        tag: found.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()
        for tag in ("config", "sample/text")
    }
    return Stored(
        1,
        *([(e.step, e.value) for e in found.Scalars(f"{tag}")] for tag in SERIES),
        *texts.values(),
        has_image=len(found.Images("end/training_curves")) == 1,
    )


def read_wandb(folder: Path) -> Stored:
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    records = []
    for path in files:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        records += [json.loads(line) for line in done.stdout.splitlines()]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers)), "a resumed run drops rows that are not in order"
    [config] = {json.dumps(record["run"]["config"]) for record in records if "run" in record}
    text = next(row["sample/text.path"] for row in rows if "sample/text.path" in row)
    return Stored(
        len({path.name for path in files}),
        *([(row["step"], float(row[tag])) for row in rows if tag in row] for tag in SERIES),
        config,
        next((folder / "wandb").glob(f"*/files/{text}")).read_text(),
        any("end/training_curves.path" in row for row in rows),
    )


def read_trackio(folder: Path) -> Stored:
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs("gptforge")
    rows = SQLiteStorage.get_logs("gptforge", runs[0])
    assert (folder / "trackio" / "gptforge.db").is_file()
    return Stored(
        len(runs),
        *([(row["step"], float(row[tag])) for row in rows if tag in row] for tag in SERIES),
        json.dumps(SQLiteStorage.get_run_config("gptforge", runs[0])),
        next(row["sample/text"]["_value"] for row in rows if "sample/text" in row),
        any("end/training_curves" in row for row in rows),
    )


def read_mlflow(folder: Path) -> Stored:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gptforge").experiment_id
    runs = client.search_runs([experiment])
    id = runs[0].info.run_id
    assert runs[0].info.status == "FINISHED"
    history = [client.get_metric_history(id, tag) for tag in SERIES]
    text = client.download_artifacts(id, "sample/text/step-000008.txt", str(folder))
    return Stored(
        len(runs),
        *(sorted((metric.step, metric.value) for metric in metrics) for metrics in history),
        json.dumps(runs[0].data.params),
        Path(text).read_text(),
        [file.path for file in client.list_artifacts(id)].count("training_curves.png") == 1,
    )


SERIES = ("train/loss", "eval/val_loss")
READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


def skip_without(name: str) -> None:
    # Not importorskip: trackio reads its variables when it is imported.
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch) -> None:
    """No variables of the user's, and a home without keys."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TRACKIO_DIR", "WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "read"), READERS.items(), ids=READERS)
def test_a_run_and_its_resumption_are_one_run_of_the_tracker(
    name: str, read: Callable[[Path], Stored], tmp_path, messages
) -> None:
    skip_without(name)
    curves = tmp_path / "training_curves.png"
    save_curves(History(), curves, title="t")
    config = Config(out_dir="runs/hamlet", seed=4711, tracker=name)

    def train(first: int, last: int, reason: str) -> None:
        with Trackers([name], config) as to:
            for step in range(first, last):
                to.log("train", step, {"loss": math.nan if step == 1 else step / 4, "lr": 1e-3})
                if step % 2:
                    to.log("eval", step + 1, {"val_loss": step / 2, "val_bpb": 1.0})
            if reason == "finished":
                to.log("sample", last, {"text": TEXT})
                to.log("end", last, {"training_curves": curves})
            to.finish(reason)

    train(0, 5, "interrupted")
    train(4, STEPS, "finished")  # from the checkpoint of step 4
    assert not [message for message in messages if "warning" in message]
    assert any(message.startswith(f"{name}: ") for message in messages)
    stored = read(Path("runs/hamlet/tracking"))
    assert stored.runs == 1
    assert [step for step, _ in stored.loss] == list(range(STEPS))
    assert [loss for step, loss in stored.loss if step != 1] == [
        step / 4 for step in range(STEPS) if step != 1
    ]
    assert stored.val_loss == [(2, 0.5), (4, 1.5), (6, 2.5), (8, 3.5)]
    assert "4711" in stored.config
    assert "wherefore" in stored.text
    assert stored.has_image
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "home", curves.name}


def test_wandb_without_a_key_says_so_and_never_asks(tmp_path, monkeypatch, messages) -> None:
    skip_without("wandb")

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked for a key")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with Trackers(["wandb"], Config(out_dir="run")) as to:
        to.finish("finished")
    assert any("no API key" in message for message in messages)
    assert list(Path("run/tracking/wandb").glob("offline-run-*"))
