import math
import struct

import matplotlib as mpl
import pytest

from gptforge.report.curves import plot_curves, save_curves
from gptforge.report.metrics import History
from tests.report.events import eval_events, final_event, train_event


@pytest.fixture(autouse=True)
def blank_pictures() -> None:
    """Not here: they are what is tested."""


def history(steps: int, *, every: int = 1, **fields: float) -> History:
    train = [train_event(step, 1 + 3 / (step + 1)) | fields for step in range(0, steps, every)]
    return History(train, eval_events((steps // 2, 2.0), (steps, 1.5)))


def test_any_history_can_be_drawn(tmp_path) -> None:
    nan_eval = {**eval_events((1, 2.0))[0], "val_loss": None}
    histories = [
        History(),
        History(train=[train_event(0)]),
        History(
            train=[train_event(i, 10.0 / (i + 1)) for i in range(40)],
            evals=eval_events((20, 3.0), (40, 2.0)),
        ),
        History(train=[{**train_event(0), "loss": None}], evals=[nan_eval]),
    ]
    for events in histories:
        save_curves(events, tmp_path / "curves.png", title="test")
        raw = (tmp_path / "curves.png").read_bytes()
        assert raw[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", raw[16:24])
        assert width > 1000
        assert height > 500
        (tmp_path / "curves.png").unlink()


def test_the_style_is_the_same_with_a_matplotlibrc(tmp_path) -> None:
    pictures = []
    for name, style in (("a", {}), ("b", {"axes.facecolor": "black", "savefig.dpi": 20})):
        with mpl.rc_context(style):
            save_curves(history(20), tmp_path / f"{name}.png", title="test")
            assert not style or mpl.rcParams["savefig.dpi"] == 20
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(("steps", "every"), [(2, 1), (3, 1), (12, 1), (2000, 5), (10**6, 1000)])
def test_all_panels_have_the_same_integer_steps(steps, every) -> None:
    panels = plot_curves(history(steps, every=every), title="t").axes
    assert len({axes.get_xlim() for axes in panels}) == 1
    for axes in panels:
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    labels = [label.get_text() for label in panels[0].get_xticklabels()]
    assert len(set(labels)) == len(labels)


def test_best_loss_is_above_the_axes_and_a_log_scale_is_named() -> None:
    rising = History([train_event(i, 1 + i) for i in range(40)], eval_events((9, 3), (40, 9)))
    for events in (history(40), rising):
        [loss, *_] = plot_curves(events, title="t").axes
        assert not loss.texts
        title = loss.get_title(loc="right")
        assert "best held out" in title and "nats per token" in title
        assert ("logarithmic" in loss.get_title(loc="left")) == (loss.get_yscale() == "log")


def test_the_loss_on_all_held_out_text_is_written_and_the_curve_names_its_part() -> None:
    evals = [event | {"val_tokens": 400} for event in eval_events((9, 3), (40, 2))]
    events = History([train_event(1)], evals, final=final_event(40, loss=2.5, tokens=1000))
    [loss, *_] = plot_curves(events, title="t").axes
    expected = "best held out 2.5000 nats per token, 1.2500 bits per byte, after 40 steps"
    assert loss.get_title(loc="right") == expected
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["training", "held out, 400 of 1,000 tokens"]


def test_without_a_loss_on_all_held_out_text_the_curve_names_its_tokens() -> None:
    evals = [event | {"val_tokens": 400} for event in eval_events((9, 3), (40, 2))]
    [loss, *_] = plot_curves(History([train_event(1)], evals), title="t").axes
    assert "held out, 400 tokens" in [text.get_text() for text in loss.get_legend().get_texts()]


def test_a_constant_speed_looks_constant() -> None:
    *_, speed = plot_curves(history(50, tok_per_sec=9000.0), title="t").axes
    bottom, top = speed.get_ylim()
    assert bottom == 0
    assert 1.05 * 9000 < top < 1.5 * 9000


def test_an_outlier_does_not_squash_the_speed() -> None:
    events = history(50, tok_per_sec=9000.0)
    events.train[20]["tok_per_sec"] = 1e13
    *_, speed = plot_curves(events, title="t").axes
    assert speed.get_ylim()[1] < 5 * 9000


def test_running_mean_keeps_the_first_value_and_skips_gaps() -> None:
    events = history(1000)
    events.train[500]["loss"] = None
    [loss, *_] = plot_curves(events, title="t").axes
    raw, mean = (line.get_ydata() for line in loss.lines[:2])
    assert math.isnan(raw[500])
    assert math.isfinite(mean[500])
    assert mean[0] == raw[0]
