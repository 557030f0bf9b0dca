"""What --grid and --random search."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.sweep.space import (
    NOT_SWEPT,
    Choices,
    Range,
    describe,
    grid_search,
    largest,
    parse_space,
    random_search,
)

BASE = Config()


def parse(*specs: str, flag: str = "--random") -> dict[str, Choices | Range]:
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
        "n_head": Choices((2, 4)),
        "optimizer": Choices(("muon",)),
        "weight_decay": Choices((1.0, 0.1)),
        "compile": Choices(("true", "auto")),
        "random_offset": Choices((True, False)),
    }
    assert isinstance(space["weight_decay"].values[0], float)


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
        *((f"{name}=1", "--grid", "cannot be swept") for name in NOT_SWEPT),
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


@given(seed=st.integers(0, 2**63 - 1))
def test_random_search_stays_inside_the_ranges_and_repeats_nothing(seed) -> None:
    space = parse("max_lr=log:1e-4..1e-2", "n_layer=2..4", "optimizer=adamw,muon")
    found = list(random_search(space, 20, seed))
    assert len({describe(values) for values in found}) == 20
    for values in found:
        assert 1e-4 <= values["max_lr"] <= 1e-2
        assert values["n_layer"] in (2, 3, 4) and isinstance(values["n_layer"], int)
    # More trials begin with the same ones, so a sweep can be extended.
    assert list(random_search(space, 30, seed))[:20] == found


def test_random_search_ends_when_there_are_no_more_values() -> None:
    space = parse("n_layer=1..3", "shuffle=true,false")
    found = {describe(values) for values in random_search(space, 100, seed=0)}
    assert len(found) == 6


def test_a_logarithmic_range_is_uniform_in_the_logarithm() -> None:
    draws = random_search(parse("max_lr=log:1e-4..1e-2"), 2000, seed=0)
    below = sum(values["max_lr"] < 1e-3 for values in draws)
    assert abs(below - 1000) < 4 * math.sqrt(500)


def test_largest_has_the_upper_ends_of_numbers() -> None:
    space = parse("n_layer=2..8", "n_embd=64,128,32", "optimizer=muon,adamw")
    assert largest(space) == {"n_layer": 8, "n_embd": 128}
