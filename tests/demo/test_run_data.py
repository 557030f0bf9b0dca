"""What the page knows of a run, without a browser."""

import json
import shutil
from pathlib import Path

import pytest

from gptforge.builders.load_model import load
from gptforge.demo.run_data import MAX_POINTS, ModelCache, run_metrics
from gptforge.errors import UserError
from gptforge.files import json_line, set_link
from gptforge.report.metrics import History, read_history
from tests.convert.conftest import run as run
from tests.convert.conftest import trained_run as trained_run
from tests.report.events import eval_events, final_event


def test_only_checkpoints_of_the_run_can_be_loaded(run) -> None:
    loaded = []

    def load_model(folder):
        loaded.append(folder)
        return load(folder, device="cpu")

    models = ModelCache(load_model, run)
    names = models.names()
    assert names[:2] == ["best", "last"]
    assert names[2] == "step-000020"
    for name in names:
        models.get(name)
    # best and last are links to steps.
    assert len(set(loaded)) == len(names) - 2
    assert models.target("last") == models.target("step-000020") == "step-000020"
    for unknown in ("../../etc", "step-999999", ""):
        with pytest.raises(UserError, match="choose another"):
            models.get(unknown)


def test_the_newer_best_model_is_loaded_if_the_older_one_is_deleted_meanwhile(run) -> None:
    folder, loaded = Path(run, "checkpoints"), []
    set_link(folder / "best", "step-000012")

    def load_model(path: str):
        loaded.append(Path(path).name)
        if len(loaded) == 1:
            set_link(folder / "best", "step-000020")
            shutil.rmtree(path)
        return load(path, device="cpu")

    models = ModelCache(load_model, run)
    models.get("best")
    assert loaded == ["step-000012", "step-000020"]
    shutil.rmtree(folder / "step-000020")
    with pytest.raises(UserError, match="choose another"):
        models.get("step-000020")


def metrics_of(tmp_path, lines, max_steps):
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    checkpoints = [("best", "step-000060"), ("step-000060",) * 2, ("step-000006",) * 2]
    found = run_metrics(read_history(tmp_path / "metrics.jsonl"), checkpoints, max_steps=max_steps)
    json.dumps(found, allow_nan=False)
    return found


def test_key_figures(tmp_path) -> None:
    assert metrics_of(tmp_path, [], 100)["tiles"] == []
    fields = {"loss": 2.0, "dt_ms": 100.0, "tok_per_sec": 1e4, "norm": 1, "lr": 1e-3}
    lines = [{"event": "train", "step": step, **fields} for step in range(60)]
    found = metrics_of(tmp_path, lines, 100)
    assert [name for name, _, _ in found["tiles"]] == ["step", "tokens per second", "time left"]
    assert found["tiles"][-1] == ("time left", "4 seconds", "about")
    assert found["progress"] == 0.6
    for step, loss in ((60, 3.21), (61, None)):
        lines.append({"event": "eval", "step": step, "val_loss": loss, "val_bpb": loss})
    found = metrics_of(tmp_path, lines, 100)
    assert ("best val loss", "3.2100", "nats per token, step 60") in found["tiles"]
    assert found["evals"] == {"step": [60], "val_loss": [3.21]}
    assert ("bits per byte", "3.2100", "held-out text") in found["tiles"]
    lines.append(lines[60] | {"step": 62, "val_loss": 2.0, "val_bpb": 3.0, "val_tokens": 4096})
    found = metrics_of(tmp_path, lines, 100)
    assert ("bits per byte", "3.0000", "4,096 held-out tokens") in found["tiles"]
    lines.append({"event": "end", "reason": "interrupted", "step": 60})
    assert "time left" not in str(metrics_of(tmp_path, lines, 100)["tiles"])
    # A step that best or last points to is listed once.
    assert found["checkpoints"] == [
        ["best", "best · step 60 · val loss 3.210"], ["step-000006", "step 6"]
    ]  # fmt: skip


def test_steps_count_those_that_were_not_logged(tmp_path) -> None:
    fields = {"loss": 2.0, "dt_ms": 100.0, "tok_per_sec": 1e4, "norm": 1, "lr": 1e-3}
    lines = [{"event": "train", "step": 30, **fields}]
    lines.append({"event": "end", "reason": "early_stop", "step": 35})
    found = metrics_of(tmp_path, lines, 40)
    assert (found["tiles"][0], found["progress"]) == (("step", "35", "of 40"), 35 / 40)


def test_labels_tell_a_dropped_checkpoint_from_a_later_one_of_its_step() -> None:
    evals = eval_events((40, 3.0), (60, 2.5), (80, 2.4))
    history = History(evals=evals, final=final_event(60, loss=2.0, tokens=99))
    names = {"best": "step-000060.decayed-1", "last": "step-000080", "step-000060": "step-000060"}
    found = run_metrics(history, list(names.items()), max_steps=80)
    assert [label for _, label in found["checkpoints"]] == [
        *("best · step 60 · val loss 2.000", "last · step 80 · val loss 2.400"),
        "step 60 · val loss 2.500",
    ]


def test_long_curves_are_thinned(tmp_path) -> None:
    fields = {"dt_ms": 1.0, "tok_per_sec": None, "norm": 1.0, "lr": 1.0}
    lines = [{"event": "train", "step": n, "loss": 1 / (n + 1), **fields} for n in range(5000)]
    train = metrics_of(tmp_path, lines, 5000)["train"]
    assert MAX_POINTS / 2 < len(train["step"]) <= MAX_POINTS
    assert train["step"][-1] == 4999
    assert len(set(map(len, train.values()))) == 1
    assert train["tok_per_sec"][0] is None


def test_without_its_packages_there_is_an_install_hint(program, run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = program("demo", run)
    assert done.code == 2
    assert "pip install -e '.[demo]'" in done.err


def test_a_wrong_argument_is_one_line(program) -> None:
    for args in (("demo", "nowhere"), ("demo", "run", "--port", "99999"), ("demo",)):
        done = program(*args)
        assert (done.code, done.err.count("\n")) == (2, 1)
