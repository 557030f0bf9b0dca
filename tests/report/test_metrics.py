import json
import math
import os
from itertools import pairwise

import pytest

from gptforge.checkpoint import out_dir
from gptforge.report import metrics
from gptforge.report.format import format_count, format_duration
from gptforge.report.metrics import read_history, step_line
from tests.report.events import final_event, train_event


def test_step_line_format() -> None:
    event = {
        "step": 10,
        "loss": 8.61173,
        "dt_ms": 19315.149,
        "tok_per_sec": 6785.971,
        "norm": 2.9288,
        "lr": 1.1e-4,
    }
    assert step_line(event) == (
        "step 10 | loss: 8.6117 | dt: 19315.15ms | tok/sec: 6785.97 | norm: 2.93 | lr: 0.000110"
    )


def test_malformed_lines_are_skipped(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"event": "train", "step": 0}\n{"event": "tra\n\n[]\n{"event": "eval", "step": 1}\n'
    )
    history = read_history(path)
    assert (len(history.train), len(history.evals)) == (1, 1)


def test_only_an_end_event_with_all_its_numbers_has_a_final_loss(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    end = {"event": "end", "reason": "finished", "step": 3, **final_event(2, loss=2.5, tokens=9)}
    broken = [{"final_val_loss": value} for value in (None, "2", math.inf)]
    broken += [{"best_step": 1.5}, {"best_step": -1}]
    for change in ({}, *broken):
        path.write_text(json.dumps(end | change) + "\n")
        final = read_history(path).final
        assert (final is None) == bool(change)
        assert final is None or final.items() >= final_event(2, loss=2.5, tokens=9).items()


@pytest.mark.parametrize("count", [0, 1, 16, 17, 18, 31, 32, 33, 34, 100, 1000, 1025])
def test_train_events_are_downsampled_evenly(tmp_path, monkeypatch, count) -> None:
    monkeypatch.setattr(metrics, "MAX_TRAIN_EVENTS", 16)
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(count):
            file.write(json.dumps(train_event(step) | {"event": "train"}) + "\n")
            if step % 10 == 9:
                file.write(json.dumps({"event": "eval", "step": step + 1}) + "\n")
    history = read_history(path)
    steps = [event["step"] for event in history.train]
    assert len(history.evals) == count // 10
    if count <= 16:
        assert steps == list(range(count))
        return
    assert 8 <= len(steps) <= 17
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert len({b - a for a, b in pairwise(steps[:-1])}) == 1
    assert steps[-1] - steps[-2] <= steps[1]


def test_only_the_end_of_a_regular_file_is_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in range(100)]
    path.write_text("".join(lines) + "x" * 10**6 + "\n" + lines[0])
    assert len(read_history(path).train) == 101
    monkeypatch.setattr(out_dir, "MAX_METRICS_BYTES", 10**6 + 2 * len(lines[0]))
    assert [event["step"] for event in read_history(path).train] == [0]
    if os.name != "nt":
        (tmp_path / "link").symlink_to(path)
        os.mkfifo(tmp_path / "pipe")
        for name in ("link", "pipe", "missing"):
            assert not read_history(tmp_path / name).train


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 second"),
        (40, "40 seconds"),
        (240, "4 minutes"),
        (3 * 3600, "3.0 hours"),
        (12 * 86400, "12 days"),
    ],
)
def test_format_duration(seconds, text) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (7, "7"),
        (999.4, "999"),
        (999.6, "1 K"),
        (28.6e3, "28.6 K"),
        (113e12, "113 T"),
        (2e21, "2 Z"),
        (4.6e26, "4.6e+05 Z"),
    ],
)
def test_format_count(count, text) -> None:
    """The last one ended `gptforge plan` with a traceback: it has more digits than prefixes."""
    assert format_count(count) == text
