"""The picture of a run, from one step to very many."""

import math
import struct

import pytest

from gptforge.report.curves import plot_curves, save_curves
from gptforge.report.metrics import History
from tests.report.test_report import event, judged


def run(steps: int, *, every: int = 1, **facts: float) -> History:
    train = [event(step, 1 + 3 / (step + 1)) | facts for step in range(0, steps, every)]
    return History(train, judged((steps // 2, 2.0), (steps, 1.5)))


def test_curves_are_drawn_from_whatever_there_is(tmp_path) -> None:
    histories = [
        History(),
        History(train=[event(0)]),
        History(train=[event(i, 10.0 / (i + 1)) for i in range(40)],
                evals=judged((20, 3.0), (40, 2.0))),
        History(train=[{**event(0), "loss": None}], evals=[{**judged((1, 2.0))[0],
                                                            "val_loss": None}]),
    ]  # fmt: skip
    for history in histories:
        save_curves(history, tmp_path / "curves.png", title="test")
        raw = (tmp_path / "curves.png").read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", raw[16:24])
        assert width > 1000
        assert height > 500
        (tmp_path / "curves.png").unlink()


@pytest.mark.parametrize(("steps", "every"), [(2, 1), (3, 1), (12, 1), (2000, 5), (10**6, 1000)])
def test_all_panels_count_the_same_whole_steps(steps, every) -> None:
    panels = plot_curves(run(steps, every=every), title="t").axes
    assert len({axes.get_xlim() for axes in panels}) == 1
    for axes in panels:
        ticks = axes.get_xticks()
        assert all(float(tick).is_integer() for tick in ticks)
    words = [label.get_text() for label in panels[0].get_xticklabels()]
    assert len(set(words)) == len(words)


def test_nothing_is_written_across_the_curves() -> None:
    for history in (
        run(40),
        History([event(i, 1 + i) for i in range(40)], judged((9, 3), (40, 9))),
    ):
        [loss, *_] = plot_curves(history, title="t").axes
        assert not loss.texts
        assert "best held out" in loss.get_title(loc="right")


def test_a_level_speed_looks_level() -> None:
    *_, speed = plot_curves(run(50, tok_per_sec=9000.0), title="t").axes
    bottom, top = speed.get_ylim()
    assert bottom == 0
    assert 1.05 * 9000 < top < 1.5 * 9000


@pytest.mark.parametrize(
    ("speed", "words", "shown"),
    [(42.0, "tokens a second", 42), (25e4, "thousand tokens a second", 250),
     (3e6, "million tokens a second", 3)],
)  # fmt: skip
def test_a_speed_is_told_in_numbers_that_can_be_read(speed, words, shown) -> None:
    *_, axes = plot_curves(run(9, tok_per_sec=speed), title="t").axes
    assert axes.get_title(loc="left") == words
    assert axes.lines[0].get_ydata() == pytest.approx(shown)


def test_a_clock_that_was_set_back_does_not_squash_the_speed() -> None:
    history = run(50, tok_per_sec=9000.0)
    history.train[20]["tok_per_sec"] = 1e13
    *_, speed = plot_curves(history, title="t").axes
    assert speed.get_ylim()[1] < 5 * 9000


def test_the_mean_of_many_noisy_points_keeps_beginning_and_gaps() -> None:
    history = run(1000)
    history.train[500]["loss"] = None
    [loss, *_] = plot_curves(history, title="t").axes
    raw, mean = (line.get_ydata() for line in loss.lines[:2])
    assert math.isnan(raw[500])
    assert math.isfinite(mean[500])
    assert mean[0] == raw[0]
