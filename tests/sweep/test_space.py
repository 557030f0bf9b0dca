"""What a sweep searches."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest

from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.sweep.space import (
    NOT_SWEPT,
    Range,
    Space,
    describe,
    format_value,
    grid_search,
    largest,
    optuna_search,
    parse_space,
)

BASE = Config()
needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs optuna")


def parse(*specs: str, flag: str = "--random") -> Space:
    return parse_space(specs, BASE, flag=flag)


def test_values_and_ranges_have_the_type_of_their_field() -> None:
    space = parse(
        "max_lr=log:1e-4..1e-2", "dropout=0..0.4", "n_layer=2..8", "n-head=2, 4", "optimizer=muon",
        "weight_decay=1,0.1", "compile=true,auto", "random_offset=true,false",
    )  # fmt: skip
    assert space == {
        "max_lr": Range(1e-4, 1e-2, is_log=True, is_int=False),
        "dropout": Range(0.0, 0.4, is_log=False, is_int=False),
        "n_layer": Range(2, 8, is_log=False, is_int=True),
        "n_head": (2, 4),
        "optimizer": ("muon",),
        "weight_decay": (1.0, 0.1),
        "compile": ("true", "auto"),
        "random_offset": (True, False),
    }
    assert isinstance(space["weight_decay"][0], float)


@pytest.mark.parametrize(
    ("spec", "flag", "words"),
    [
        ("max_lrr=1", "--grid", "did you mean 'max_lr'?"),
        ("max_lr=fast", "--grid", "max_lr takes a number, not 'fast'"),
        ("n_layer=2.5", "--grid", "n_layer takes a whole number, not 2.5"),
        ("dropout=0..0.4", "--grid", "use --random"),
        ("max_lr=", "--grid", "give values"),
        ("max_lr=,", "--grid", "give values"),
        ("max_lr", "--grid", "give values"),
        ("dropout=0.4..0", "--random", "from a smaller number to a larger one"),
        ("dropout=0..nan", "--random", "from a smaller number to a larger one"),
        ("dropout=0..0.1..0.2", "--random", "each end of a range of dropout is a number"),
        ("n_layer=2..2.5", "--tpe", "each end of a range of n_layer is a whole number"),
        ("max_lr=log:0..1", "--tpe", "begins above 0"),
        *((f"{name}=1", "--grid", "cannot be swept") for name in sorted(NOT_SWEPT)),
    ],
)
def test_a_mistake_names_the_flag_and_the_fix(spec, flag, words) -> None:
    with pytest.raises(UserError, match=f"^{flag} ") as error:
        parse(spec, flag=flag)
    assert words in str(error.value)


def test_a_field_is_given_once() -> None:
    with pytest.raises(UserError, match="given twice"):
        parse("max_lr=1e-3", "max-lr=2e-3")


def test_grid_search_gives_every_combination_once() -> None:
    space = parse("max_lr=1e-3,2e-3,1e-3", "n_layer=1,2,3", flag="--grid")
    found = [(values["max_lr"], values["n_layer"]) for values in grid_search(space)]
    assert found == list(itertools.product([1e-3, 2e-3], [1, 2, 3]))


def search(space: Space, trials: int, folder: Path, method: str = "random", **losses: float):
    found: dict[str, float | None] = dict(losses)
    for values in optuna_search(
        space, method, seed=0, trials=trials, study="test", folder=folder, losses=lambda: found
    ):
        yield values, found


@needs_optuna
def test_random_search_stays_inside_the_ranges_and_is_uniform_in_the_logarithm(tmp_path) -> None:
    space = parse("max_lr=log:1e-4..1e-2", "n_layer=2..4", "optimizer=adamw,muon")
    found = [values for values, _ in search(space, 60, tmp_path)]
    for values in found:
        assert 1e-4 <= values["max_lr"] <= 1e-2
        assert values["n_layer"] in (2, 3, 4) and isinstance(values["n_layer"], int)
        assert float(format_value(values["max_lr"])) == values["max_lr"]
    below = sum(values["max_lr"] < 1e-3 for values in found)
    assert abs(below - 30) < 4 * math.sqrt(15)


@needs_optuna
def test_tpe_learns_from_losses(tmp_path) -> None:
    tried = []
    for values, losses in search(parse("weight_decay=0..1"), 24, tmp_path, "tpe"):
        tried.append(values["weight_decay"])
        losses[describe(values)] = (values["weight_decay"] - 0.3) ** 2
    early, late = tried[:8], tried[-8:]
    assert sum(abs(v - 0.3) for v in late) < 0.5 * sum(abs(v - 0.3) for v in early)


@needs_optuna
@pytest.mark.parametrize("method", ["random", "tpe"])
def test_a_second_process_gets_the_same_trials_and_then_new_ones(tmp_path, method) -> None:
    import optuna

    space = parse("max_lr=log:1e-4..1e-2", "n_layer=1..8", "optimizer=adamw,muon")
    first = search(space, 5, tmp_path, method)
    known = [next(first)[0] for _ in range(3)]  # the process ends before any loss is known
    found = []
    for values, losses in search(space, 5, tmp_path, method):
        found.append(values)
        losses[describe(values)] = None if len(found) == 2 else 1.0
    assert found[:3] == known
    assert len({describe(values) for values in found}) == 5
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'optuna.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_largest_has_the_upper_ends_of_numbers() -> None:
    space = parse("n_layer=2..8", "n_embd=64,128,32", "optimizer=muon,adamw")
    assert largest(space) == {"n_layer": 8, "n_embd": 128}
