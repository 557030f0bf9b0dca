"""sweep.png."""

import pytest

from gptforge.sweep.results import TrialResult, plot_sweep
from gptforge.sweep.space import Space, grid_search

ONE: Space = {"max_lr": (1e-4, 1e-3, 1e-2)}
MANY: Space = {
    "max_lr": (1e-4, 1e-2),
    "dropout": (0.0, 0.4),
    "n_layer": (2, 8),
    "optimizer": ("adamw", "muon"),
    "shuffle": (True, False),
}


def results(space: Space, losses: tuple[float, ...] = ()) -> list[TrialResult]:
    found = list(grid_search(space))
    losses = losses or tuple(2 - 0.01 * i for i in range(len(found)))
    made = [
        TrialResult(str(i), values, (loss, loss + 0.02), 100, 2.0, 1.0)
        for i, (values, loss) in enumerate(zip(found, losses, strict=True))
    ]
    return sorted(made, key=lambda result: result.loss)


def test_one_field_is_a_curve_over_a_logarithmic_axis() -> None:
    (axes,) = plot_sweep(results(ONE), title="$one").axes
    assert axes.get_xscale() == "log"
    assert list(axes.lines[-1].get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    assert "best 0.01" in axes.get_title(loc="left")


@pytest.mark.parametrize("count", [2, 4, 5])
def test_each_field_has_a_panel(count) -> None:
    space = dict(list(MANY.items())[:count])
    figure = plot_sweep(results(space), title="many")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left").split(",")[0] for axes in panels] == list(space)


def test_lines_join_trials_that_differ_in_one_field() -> None:
    space: Space = {"max_lr": (1e-4, 1e-3, 1e-2), "optimizer": ("adamw", "muon")}
    rate, optimizer = plot_sweep(results(space), title="grid").axes
    joined = [[len(line.get_xdata()) for line in axes.lines] for axes in (rate, optimizer)]
    assert [lengths.count(3) for lengths in joined] == [2, 0]
    assert [lengths.count(2) for lengths in joined] == [0, 3]


def test_a_diverged_trial_does_not_flatten_the_others() -> None:
    shown = results({"n_layer": (1, 2, 3, 4, 5)}, (1.5, 1.52, 1.51, 1.53, 90.0))
    (axes,) = plot_sweep(shown, title="diverged").axes
    assert axes.get_ylim()[1] < 2
    assert [line.get_marker() for line in axes.lines].count("^") == 1


def test_one_trial_can_be_drawn(tmp_path) -> None:
    plot_sweep(results({"n_layer": (1,)}), title="one").savefig(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[1:4] == b"PNG"


def test_values_too_close_for_labels_are_not_labeled(tmp_path) -> None:
    space: Space = {"max_lr": (3.342e-4, 3.6e-4, 2.922e-3)}
    figure = plot_sweep(results(space), title="random")
    figure.savefig(tmp_path / "sweep.png")
    assert "0.000334" not in [label.get_text() for label in figure.axes[0].get_xticklabels()]
