"""`benchmarks/recipe_grid.py`: neighbors of the rule, and the table of their results."""

import sys
from dataclasses import asdict

import pytest

from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.recipe import make_recipe
from tests.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import recipe_grid


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("num_bytes", [9_000, 300_000, 1_000_000, 18_000_000])
def test_neighbors_are_valid_and_differ_from_the_rule(num_bytes, device) -> None:
    recipe = make_recipe(num_bytes, device)
    changes = recipe_grid.neighbors(num_bytes, "auto", device)
    assert changes.pop(recipe_grid.RULE) == {}
    for values in changes.values():
        adapted = make_recipe(num_bytes, device, explicit=values)
        config = Config(**adapted.values | values)
        validate(config)
        assert asdict(config) != asdict(Config(**recipe.values))


def test_batches_are_those_of_a_step() -> None:
    rule = make_recipe(300_000, "cpu").values
    changes = recipe_grid.neighbors(300_000, "auto", "cpu")
    for change, factor in (("half the batch", 0.5), ("twice the batch", 2)):
        values = changes[change]
        config = Config(**make_recipe(300_000, "cpu", explicit=values).values | values)
        assert config.tokens_per_step == factor * Config(**rule).tokens_per_step
        assert config.max_steps == rule["max_steps"] / factor


def test_table_compares_means_with_the_rule() -> None:
    def result(change: str, nats: float, seed: int) -> dict:
        task = recipe_grid.Task("book", 300_000, "auto", "cpu", change, "--dropout 0.1", seed)
        return asdict(task) | {"nats": nats, "best_step": 90, "steps": 100}

    results = [result(recipe_grid.RULE, nats, seed) for seed, nats in ((1, 1.9), (2, 2.1))]
    rows = recipe_grid.table([*results, result("dropout + 0.1", 1.8, 1)]).splitlines()
    assert rows[2].startswith("| dropout + 0.1 | 1.8000 | -10.00% | 1 | 90 of 100 |")
    assert rows[3].startswith("| the rule | 2.0000 | +0.00% | 2 |")
