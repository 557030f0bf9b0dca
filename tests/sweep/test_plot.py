"""sweep.png."""

import pytest

from gptforge.config import Config
from gptforge.sweep.plot import plot_sweep, save_plot
from gptforge.sweep.results import TrialResult
from gptforge.sweep.space import grid_search, parse_space, random_search


def results(space, *, trials: int = 0, losses=()) -> list[TrialResult]:
    found = random_search(space, trials, 0) if trials else grid_search(space)
    numbered = list(enumerate(found, 1))
    losses = losses or [2 - 0.01 * number for number, _ in numbered]
    made = [
        TrialResult(number, values, (1, 2), (loss, loss + 0.02), 100, 2.0, 1.0)
        for (number, values), loss in zip(numbered, losses, strict=False)
    ]
    return sorted(made, key=lambda result: result.loss)


def test_one_field_is_a_curve_over_a_logarithmic_axis() -> None:
    space = parse_space(["max_lr=1e-4,1e-3,1e-2"], Config(), flag="--grid")
    figure = plot_sweep(results(space), space, title="$one")
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.001", "0.01"]
    assert "best 0.01" in axes.get_title(loc="left")


def test_a_grid_of_two_fields_is_a_heat_map_with_a_label_per_trial() -> None:
    space = parse_space(["dropout=0,0.2", "max_lr=1e-4,1e-3,1e-2"], Config(), flag="--grid")
    shown = results(space)[:-1]  # one failed
    axes, _ = plot_sweep(shown, space, title="two").axes
    labels = [text.get_text() for text in axes.texts]
    assert labels.count("failed") == 1 and len(set(labels)) == 6
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("max_lr", "dropout")


@pytest.mark.parametrize("count", [2, 4, 5])
def test_other_sweeps_have_a_panel_for_each_field(count) -> None:
    specs = ["max_lr=log:1e-4..1e-2", "dropout=0..0.4", "n_layer=2..8", "optimizer=adamw,muon",
             "shuffle=true,false"]  # fmt: skip
    space = parse_space(specs[:count], Config(), flag="--random")
    figure = plot_sweep(results(space, trials=8), space, title="many")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == count
    titles = [axes.get_title(loc="left").split(",")[0] for axes in panels]
    assert titles == [spec.split("=")[0] for spec in specs[:count]]


def test_a_diverged_trial_does_not_flatten_the_others() -> None:
    space = parse_space(["n_layer=1,2,3,4,5"], Config(), flag="--grid")
    shown = results(space, losses=[1.5, 1.52, 1.51, 1.53, 90.0])
    (axes,) = plot_sweep(shown, space, title="diverged").axes
    assert axes.get_ylim()[1] < 2
    assert [text.get_text() for text in axes.texts] == ["90"]


def test_one_trial_can_be_drawn(tmp_path) -> None:
    space = parse_space(["n_layer=1"], Config(), flag="--grid")
    save_plot(results(space), space, tmp_path / "sweep.png", title="one")
    assert (tmp_path / "sweep.png").read_bytes()[1:4] == b"PNG"
