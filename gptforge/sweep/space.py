"""What a sweep varies: values and ranges of fields, and which of them each trial has."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptforge.config import FIELDS, RENAMED_FIELDS, TEXT_FIELDS, TYPE_NAMES, Config, Value, merge
from gptforge.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Values = dict[str, Value]
"""Swept fields and their values in one trial."""
INPUT_FIELDS = frozenset({*TEXT_FIELDS, "tokenizer", "val_fraction"})
"""Fields that say what the text is: trials read the sweep's copy instead."""
NOT_SWEPT = INPUT_FIELDS | {
    *("vocab_size", "eval_tokens", "preset", "config", "init_from"),
    *("out_dir", "restart", "device", "seed"),
}
"""Fields that all trials share, so that their losses compare, or that the sweep sets."""
STORAGE = "optuna.db"
"""Optuna's own format: optuna-dashboard opens it."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, uniform or uniform in the logarithm."""

    low: float
    high: float
    is_log: bool
    is_int: bool


Dimension = tuple[Value, ...] | Range
Space = dict[str, Dimension]


def parse_space(specs: Sequence[str], base: Config, *, flag: str) -> Space:
    """Parse `max_lr=1e-3,2e-3` (values) and `dropout=0..0.4`, `max_lr=log:1e-4..1e-2` (ranges).

    Values are checked against the types of `base`. `--grid` takes no ranges.

    Raises:
        UserError: for an unknown field, a value of the wrong type, or a malformed range.
    """
    space: Space = {}
    for spec in specs:
        name, equals, text = spec.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        name = RENAMED_FIELDS.get(name, name)
        source = f"{flag} {spec}"
        texts = [item.strip() for item in text.split(",") if item.strip()]
        if not equals or not texts:
            raise UserError(f"{source}: give values, such as {flag} max_lr=1e-3,2e-3")
        if name in NOT_SWEPT:
            raise UserError(
                f"{source}: {name} cannot be swept: trials share text, tokenizer and starting "
                "model; --seeds sets seeds, --jobs and --device where they run"
            )
        if name in space:
            raise UserError(f"{source}: {name} is given twice; separate values by commas")
        is_range = ".." in text and FIELDS.get(name) in (int, float)
        if is_range and flag == "--grid":
            raise UserError(f"{source}: a grid has no ranges: list values, or use --random")
        if is_range:
            space[name] = _parse_range(name, text, source)
        else:
            values = dict.fromkeys(_parse_value(name, item) for item in texts)
            checked = [merge(base, {name: value}, source=source) for value in values]
            space[name] = tuple(getattr(config, name) for config in checked)
    return space


def ends(dimension: Dimension) -> tuple[Value, ...]:
    """All values, or both ends of a range."""
    if isinstance(dimension, Range):
        return _rounded(dimension.low, dimension), _rounded(dimension.high, dimension)
    return dimension


def largest(space: Space) -> Values:
    """The largest number of each numeric field, for estimates of memory and length."""
    return {name: max(ends(dim)) for name, dim in space.items() if FIELDS[name] in (int, float)}


def grid_search(space: Space) -> Iterator[Values]:
    """All combinations; the last field varies fastest."""
    for values in itertools.product(*map(ends, space.values())):
        yield dict(zip(space, values, strict=True))


def optuna_search(
    space: Space,
    method: str,
    *,
    seed: int,
    trials: int,
    study: str,
    folder: Path,
    losses: Callable[[], Mapping[str, float | None]],
) -> Iterator[Values]:
    """Values of `trials` trials, which Optuna samples by `method`, tpe or random.

    The study is stored in `folder`, and a later process continues it: values of an earlier process
    come first; few possible values come more than once. `losses` gives the loss of each trial that
    has ended, None if it failed, by `describe`.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (folder / STORAGE).resolve()
    path.touch()  # SQLite's own mode is 0644, whatever the umask allows
    storage = f"sqlite:///{path.as_posix()}"
    opened = optuna.create_study(storage=storage, study_name=study, load_if_exists=True)
    # A new process must not repeat the draws of an earlier one.
    seed = (seed + len(opened.trials)) % 2**32
    opened.sampler = optuna.samplers.RandomSampler(seed)
    if method == "tpe":  # constant_liar keeps trials that run at the same time apart
        opened.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    distributions = {name: _distribution(dimension) for name, dimension in space.items()}
    # A kill may leave a trial without all of its parameters.
    known = [trial for trial in opened.trials if trial.params.keys() == space.keys()]
    yielded: dict[int, str] = {}
    for i in range(trials + 1):
        ended = losses()
        for number, values_text in yielded.items():
            if values_text in ended:
                loss = ended[values_text]
                state = optuna.trial.TrialState.FAIL if loss is None else None
                opened.tell(number, loss, state, skip_if_finished=True)
        if i < trials:
            trial = known[i] if i < len(known) else opened.ask(distributions)
            values = {name: _rounded(trial.params[name], dim) for name, dim in space.items()}
            yielded[trial.number] = describe(values)
            yield values


def describe(values: Mapping[str, Value]) -> str:
    """`max_lr=0.002 weight_decay=0.1`, in one line."""
    return " ".join(f"{name}={format_value(value)}" for name, value in values.items())


def format_value(value: Value) -> str:
    """A value as a flag takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _rounded(value: Value, dimension: Dimension) -> Value:
    """A number of a range in its type, with so few digits that it can be typed."""
    if not isinstance(dimension, Range):
        return value
    return int(value) if dimension.is_int else float(f"{value:.4g}")


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(dimension, Range):
        return CategoricalDistribution(dimension)
    if dimension.is_int:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.is_log)


def _parse_range(name: str, text: str, source: str) -> Range:
    kind, is_log = FIELDS[name], text.startswith("log:")
    try:
        low, high = map(kind, text.removeprefix("log:").split(".."))
    except ValueError:
        raise UserError(
            f"{source}: each end of a range of {name} is {TYPE_NAMES[kind]}, such as "
            f"{'2..8' if kind is int else '0.1..0.4 or log:1e-4..1e-2'}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{source}: a range goes from a smaller number to a larger one")
    if is_log and low <= 0:
        raise UserError(f"{source}: a logarithmic range begins above 0")
    return Range(low, high, is_log, is_int=kind is int)


def _parse_value(name: str, text: str) -> Value:
    """A value of the type that the text looks like; `merge` compares it with the field's."""
    if FIELDS.get(name) is str:
        return text
    for parse in ({"true": True, "false": False}.__getitem__, int, float):
        with contextlib.suppress(ValueError, KeyError):
            return parse(text)
    return text
