"""Bayesian search with Optuna's tree-structured Parzen estimator, kept in a SQLite file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gptforge.sweep.space import Choices, Range, Space, Values, describe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

STORAGE = "optuna.db"
"""Optuna's own format: optuna-dashboard opens it."""


class TPESearch:
    """Asks Optuna for the values of each trial, and tells it the losses.

    Trials of an earlier process come first, in the same order.

    Args:
        space: what to search.
        trials: how many.
        seed: of the sampler.
        folder: where the storage is.
    """

    def __init__(self, space: Space, trials: int, seed: int, folder: Path) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._trials = space, trials
        self._distributions = {name: _distribution(dim) for name, dim in space.items()}
        # One study for each space: Optuna refuses other choices for a known parameter.
        digest = hashlib.sha256(repr(space).encode()).hexdigest()[:12]
        self._study = optuna.create_study(
            storage=f"sqlite:///{(folder / STORAGE).resolve().as_posix()}",
            study_name=f"sweep-{digest}",
            load_if_exists=True,
        )
        # A new process must not repeat the draws of an earlier one. constant_liar keeps trials
        # that run at the same time apart.
        seed = (seed + len(self._study.trials)) % 2**32
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        self._numbers: dict[str, list[int]] = {}
        self._losses: dict[str, float | None] = {}

    def __iter__(self) -> Iterator[Values]:
        """Values of each trial; those of an earlier trial are not repeated."""
        complete = [
            trial for trial in self._study.trials if trial.params.keys() == self._space.keys()
        ]
        known = [(trial.number, trial.params) for trial in complete]
        for _ in range(self._trials):
            if known:
                number, params = known.pop(0)
            else:
                trial = self._study.ask(self._distributions)
                number, params = trial.number, trial.params
            values = {
                name: dim.from_float(params[name]) if isinstance(dim, Range) else params[name]
                for name, dim in self._space.items()
            }
            key = describe(values)
            self._numbers.setdefault(key, []).append(number)
            if key in self._losses:
                self.report(values, self._losses[key])
            elif len(self._numbers[key]) == 1:
                yield values

    def report(self, values: Values, loss: float | None) -> None:
        """Tell the loss of a trial, also for copies of it; None if it failed."""
        from optuna.trial import TrialState

        key = describe(values)
        self._losses[key] = loss
        state = TrialState.FAIL if loss is None else TrialState.COMPLETE
        for number in self._numbers[key]:
            self._study.tell(number, loss, state, skip_if_finished=True)


def _distribution(dimension: Choices | Range) -> "BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    if dimension.is_int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)
