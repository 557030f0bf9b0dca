"""TPE search, with the real Optuna."""

import pytest

from gptforge.config import Config
from gptforge.sweep import tpe
from gptforge.sweep.space import describe, parse_space

pytest.importorskip("optuna")

SPECS = ["max_lr=log:1e-4..1e-2", "n_layer=1..8", "optimizer=adamw,muon"]


def space(*specs: str):
    return parse_space(specs or SPECS, Config(), flag="--tpe")


def test_it_searches_the_space_and_learns_from_losses(tmp_path) -> None:
    search = tpe.TPESearch(space("weight_decay=0..1"), 24, 0, tmp_path)
    tried = []
    for values in search:
        tried.append(values["weight_decay"])
        search.report(values, (values["weight_decay"] - 0.3) ** 2)
    early, late = tried[:8], tried[-8:]
    assert all(0 <= value <= 1 for value in tried)
    assert sum(abs(v - 0.3) for v in late) < 0.5 * sum(abs(v - 0.3) for v in early)


def test_a_second_process_gets_the_same_trials_and_then_new_ones(tmp_path) -> None:
    first = iter(tpe.TPESearch(space(), 5, 0, tmp_path))
    known = [next(first) for _ in range(3)]  # none was reported before a kill
    search = tpe.TPESearch(space(), 5, 0, tmp_path)
    found = []
    for values in search:
        found.append(values)
        search.report(values, None if len(found) == 2 else 1.0)
    assert found[:3] == known
    assert len({describe(values) for values in found}) == 5
    assert [t.state.name for t in search._study.trials].count("COMPLETE") == 4


def test_values_are_not_tried_twice(tmp_path) -> None:
    search = tpe.TPESearch(space("n_layer=1,2"), 12, 0, tmp_path)
    found = []
    for values in search:
        found.append(values["n_layer"])
        search.report(values, float(values["n_layer"]))
    assert sorted(found) == [1, 2]
    assert {t.state.name for t in search._study.trials} == {"COMPLETE"}


def test_another_space_is_another_study(tmp_path) -> None:
    first = next(iter(tpe.TPESearch(space("optimizer=adamw,muon"), 1, 0, tmp_path)))
    second = next(iter(tpe.TPESearch(space("optimizer=adamw,muon", "n_layer=1,2"), 1, 0, tmp_path)))
    assert first.keys() != second.keys()
