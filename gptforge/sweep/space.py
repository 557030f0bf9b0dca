"""What a sweep varies: values and ranges of fields, and grid and random search over them."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptforge.config import FIELDS, RENAMED_FIELDS, TYPE_NAMES, Config, Value, merge
from gptforge.errors import UserError

Values = dict[str, Value]
"""Swept fields and their values in one trial."""

NOT_SWEPT = {
    "seed": "use --seeds",
    "tokenizer": "losses per token of different tokenizers cannot be compared",
    "vocab_size": "it follows from the tokenizer",
    "preset": "name its fields",
    **dict.fromkeys(
        ("config", "input", "encoding", "field", "kind", "split_by_name", "raw_bin"),
        "all trials train on the same text",
    ),
    **dict.fromkeys(("val_fraction", "eval_tokens"), "all trials are compared on the same text"),
    **dict.fromkeys(("out_dir", "restart"), "each trial has a run folder of its own"),
    "init_from": "use one sweep for each model",
    "device": "use --jobs",
}
"""Fields that cannot be swept, and why."""
MAX_DRAWS = 1000
"""Draws of random search in search of values that no earlier trial has."""
SIGNIFICANT_DIGITS = 4
"""Of floats drawn from a range, so that they can be typed."""


@dataclass(frozen=True)
class Choices:
    """Values to choose from."""

    values: tuple[Value, ...]

    def draw(self, rng: random.Random) -> Value:
        """Draw one of the values."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, uniform or uniform in the logarithm."""

    low: float
    high: float
    is_log: bool
    is_int: bool

    @property
    def values(self) -> tuple[Value, Value]:
        """Both ends."""
        return self.from_float(self.low), self.from_float(self.high)

    def from_float(self, number: float) -> Value:
        """A number of the range's type, rounded so that it can be typed."""
        return int(number) if self.is_int else float(f"{number:.{SIGNIFICANT_DIGITS}g}")

    def draw(self, rng: random.Random) -> Value:
        """Draw a number."""
        # Whole numbers are rounded down, so that each needs an interval of length 1.
        low, high = self.low, self.high + self.is_int
        if self.is_log:
            number = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            number = rng.uniform(low, high)
        return self.from_float(min(number, self.high))


Space = dict[str, Choices | Range]


def parse_space(specs: Sequence[str], base: Config, *, flag: str) -> Space:
    """Parse `max_lr=1e-3,2e-3` (values) and `dropout=0..0.4`, `max_lr=log:1e-4..1e-2` (ranges).

    Args:
        specs: one for each field.
        base: a configuration, against whose types values are checked.
        flag: where they come from, for error messages; `--grid` takes no ranges.

    Raises:
        UserError: for an unknown field, a value of the wrong type, or a range that is none.
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
            raise UserError(f"{source}: {name} cannot be swept: {NOT_SWEPT[name]}")
        if name in space:
            raise UserError(f"{source}: {name} is given twice; separate values by commas")
        is_range = ".." in text and FIELDS.get(name) in (int, float)
        if is_range and flag == "--grid":
            raise UserError(f"{source}: a grid has no ranges: list values, or use --random")
        if is_range:
            space[name] = _parse_range(name, text, source)
        else:
            values = tuple(dict.fromkeys(_parse_value(name, item) for item in texts))
            checked = [merge(base, {name: value}, source=source) for value in values]
            space[name] = Choices(tuple(getattr(config, name) for config in checked))
    return space


def grid_search(space: Space) -> Iterator[Values]:
    """All combinations; the last field varies fastest."""
    for values in itertools.product(*(dimension.values for dimension in space.values())):
        yield dict(zip(space, values, strict=True))


def random_search(space: Space, trials: int, seed: int) -> Iterator[Values]:
    """Independent draws, all different: fewer than `trials` if there are no more values.

    More trials begin with the same draws.
    """
    rng = random.Random(seed)
    seen: list[Values] = []
    for _ in range(trials):
        for _ in range(MAX_DRAWS):
            values = {name: dimension.draw(rng) for name, dimension in space.items()}
            if values not in seen:
                seen.append(values)
                yield values
                break


def largest(space: Space) -> Values:
    """The largest number of each numeric field, for estimates of memory and length."""
    numbers = {name: d.values for name, d in space.items() if FIELDS[name] in (int, float)}
    return {name: max(values) for name, values in numbers.items()}


def describe(values: Mapping[str, Value]) -> str:
    """`max_lr=0.002 weight_decay=0.1`, in one line."""
    return " ".join(f"{name}={format_value(value)}" for name, value in values.items())


def format_value(value: Value) -> str:
    """A value as a flag takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _parse_range(name: str, text: str, source: str) -> Range:
    kind = FIELDS[name]
    is_log = text.startswith("log:")
    ends = text.removeprefix("log:").split("..")
    try:
        low, high = (kind(end) for end in ends)
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
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
