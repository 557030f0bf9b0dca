"""`gptforge sweep`: search hyperparameters with many training runs on this machine."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.parsing import flag_values, normalize_flags, parse_train_args, resolve_preset
from gptforge.config import Config, merge
from gptforge.config_checks import validate
from gptforge.errors import RunError, UserError, explain_interruption
from gptforge.presets import AUTO
from gptforge.printable import safe_print
from gptforge.report.log_handler import log_to
from gptforge.shell import same_command
from gptforge.sweep.space import Space, Values, describe, ends, grid_search, parse_space

if TYPE_CHECKING:
    from gptforge.sweep.search import Method, Resolve

METHODS: "tuple[Method, ...]" = ("grid", "random", "tpe")
MAX_ROWS = 20
"""Rows of the table that are printed; results.csv has all."""
Specs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE,...")]


@dataclass(frozen=True)
class SweepConfig(Config):
    """Search for the best values of any fields. Takes all flags of train, and these."""

    grid: Specs = ()
    """Train all combinations of these values: max_lr=1e-3,2e-3 dropout=0,0.2."""
    random: Specs = ()
    """Train --trials random combinations of values and ranges: max_lr=log:1e-4..1e-2
    dropout=0..0.4. Needs Optuna."""
    tpe: Specs = ()
    """Like --random, but each trial learns from the earlier ones, with Optuna's TPE sampler."""
    trials: int = 20
    """Trials of --random and --tpe."""
    seeds: int = 1
    """Runs of each trial, with different seeds."""
    jobs: int = 0
    """Runs at a time; 0: one on a CPU; on a GPU, as many as fit, up to 4."""
    final: bool = False
    """At the end, train the best trial on the full training part and evaluate it on the test
    split."""


def main(argv: list[str]) -> None:
    """Run or resume a sweep and print its results."""
    args, explicit = parse_train_args(argv, cls=SweepConfig, prog="gptforge sweep")
    method = _method(args)
    space = parse_space(getattr(args, method), args, flag=f"--{method}")
    if twice := space.keys() & flag_values(normalize_flags(SweepConfig, argv)):
        name = min(twice)
        raise UserError(f"--{name} and --{method} {name}=... contradict each other: leave one out")
    with log_to(safe_print):
        if not args.preset:
            preset = resolve_preset(args, explicit).preset
            args, explicit = parse_train_args([*argv, "--preset", preset], cls=SweepConfig)
        resolve = _resolver(args, explicit, method)
        resolve({})  # logs preset and recipe
        resolve = log_to(lambda text: None)(resolve)
        _check_trials(method, space, resolve)
        from gptforge.report.curves import save_figure
        from gptforge.sweep.results import plot_sweep, table
        from gptforge.sweep.search import Sweep

        numbers = {"trials": args.trials, "seeds": args.seeds, "jobs": args.jobs}
        same = same_command(restart=args.restart)
        with (
            explain_interruption(lambda: f"{same} resumes the sweep"),
            closing(Sweep(space, method, resolve, explicit, **numbers)) as sweep,
        ):
            results = sweep.run()
            done = [result for result in results if result.losses]
            safe_print(f"\n{table(results[:MAX_ROWS])}\n")
            if not done:
                raise RunError(f"all trials failed; the first: {results[0].error}")
            picture = sweep.path / "sweep.png"
            save_figure(plot_sweep(done, title=f"Sweep of {sweep.path.name}"), picture)
            best = done[0]
            # The best steps of several seeds may differ.
            place = "at" if len(best.losses) == 1 else "lowest on average at"
            safe_print(
                f"Best: trial {best.trial}, {describe(best.values)}: held-out loss "
                f"{best.label} nats per token, {place} step {best.step:,}"
            )
            safe_print(f"Picture: {picture.as_posix()}; all trials: results.csv beside it")
            if not args.final:
                safe_print(
                    "The best of many trials is also the luckiest: for a loss to quote, the "
                    "same command with --final evaluates it on the test split."
                )
                return
            final = sweep.run_final(best)
            safe_print(
                f"Test split: {final.label} nats per token, {final.bits_per_byte:.4f} bits per "
                f"byte, after {final.step:,} steps; mean and standard deviation over "
                f"{len(final.losses)} seeds that no trial had"
            )


def _method(args: SweepConfig) -> "Method":
    """The one method that was chosen, after checks of the sweep's own flags."""
    chosen = [name for name in METHODS if getattr(args, name)]
    if len(chosen) != 1:
        raise UserError(
            "give one of --grid, --random and --tpe with what to search, such as "
            "--grid max_lr=1e-3,2e-3"
        )
    for name, minimum in (("trials", 1), ("seeds", 1), ("jobs", 0)):
        if getattr(args, name) < minimum:
            raise UserError(f"--{name} must be {minimum} or more, not {getattr(args, name)}")
    return chosen[0]


def _resolver(args: SweepConfig, explicit: frozenset[str], method: "Method") -> "Resolve":
    """How the configuration of a trial follows from its values."""
    from gptforge.builders.resolve import MODEL_FIELDS, folder_name, resolve_init_from
    from gptforge.builders.text_presets import resolve_auto
    from gptforge.recipe import FITTED_PRESETS, RECIPE_FIELDS

    if args.preset == AUTO and args.time_limit and "max_steps" not in explicit:
        raise UserError(
            "--preset auto would fit the steps of each trial to --time_limit: give --max_steps"
        )
    old = f"sweeps/{Path(args.input).stem}-{args.preset}"  # as earlier versions named it
    new = f"sweeps/{folder_name(args)}"
    out_dir = args.out_dir or (old if Path(old).is_dir() else new)
    base = resolve_init_from(merge(args, {"out_dir": out_dir}, source="flags"), explicit)
    recipe_fields = RECIPE_FIELDS if args.preset in FITTED_PRESETS else frozenset()
    if args.init_from:
        recipe_fields -= {*MODEL_FIELDS, "tokenizer", "context_length"}

    def resolve(values: Values) -> tuple[Config, frozenset[str]]:
        fixed = explicit | values.keys()
        config = resolve_preset(merge(base, values, source=f"--{method}"), fixed)
        return resolve_auto(config, fixed, device=args.device), fixed | recipe_fields

    return resolve


def _check_trials(method: "Method", space: Space, resolve: "Resolve") -> None:
    """Check the configurations of all trials, as far as they are known."""
    trials: Iterable[Values] = grid_search(space)
    if method != "grid":
        trials = ({name: value} for name, dim in space.items() for value in ends(dim))
    for values in trials:
        try:
            validate(resolve(values)[0])
        except UserError as error:
            raise UserError(f"--{method}: trial {describe(values)}: {error}") from None
