"""`gptforge sweep`: search hyperparameters with many training runs on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config, merge, validate
from gptforge.errors import Terminated, UserError
from gptforge.presets import AUTO
from gptforge.printable import print_stderr, safe_print
from gptforge.report.log_handler import log_to
from gptforge.sweep.space import (
    Space,
    Values,
    describe,
    grid_search,
    largest,
    parse_space,
    random_search,
)

if TYPE_CHECKING:
    from gptforge.sweep.results import TrialResult
    from gptforge.sweep.search import SweepRequest

METHODS = ("grid", "random", "tpe")
MAX_ROWS = 20
"""Rows of the table that are printed; results.csv has all."""
Specs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE,...")]


@dataclass(frozen=True)
class SweepConfig(Config):
    """Search the best values of any fields. Takes all flags of train, and these."""

    grid: Specs = ()
    """Train all combinations of these values: max_lr=1e-3,2e-3 dropout=0,0.2."""
    random: Specs = ()
    """Train --trials random combinations of values and ranges: max_lr=log:1e-4..1e-2
    dropout=0..0.4."""
    tpe: Specs = ()
    """Like --random, but each trial learns from the earlier ones, by Optuna's TPE sampler."""
    trials: int = 20
    """Trials of --random and --tpe."""
    seeds: int = 1
    """Runs of each trial, with different seeds."""
    jobs: int = 0
    """Runs at a time; 0: one on a CPU; on a GPU, as many as fit, up to 4."""
    final: bool = False
    """In the end, train the best trial on the full training part and evaluate it on the test
    tail."""


def main(argv: list[str]) -> int:
    """Run or resume a sweep and print its results; returns the exit code."""
    args, explicit = parse_train_args(argv, cls=SweepConfig, prog="gptforge sweep")
    method, specs = _method(args)
    space = parse_space(specs, args, flag=f"--{method}")
    with log_to(safe_print):
        if not args.preset:
            preset = resolve_preset(args, explicit).preset
            args, explicit = parse_train_args([*argv, "--preset", preset], cls=SweepConfig)
        request = _request(args, explicit, method, space)
        from gptforge.errors import RunError
        from gptforge.sweep.plot import save_plot
        from gptforge.sweep.results import table, write_results
        from gptforge.sweep.search import Sweep

        try:
            with Sweep(request) as sweep:
                results = sweep.run()
                write_results(sweep.dir.path, results)
                done = [result for result in results if result.losses]
                safe_print(f"\n{table(results[:MAX_ROWS], list(space))}\n")
                if not done:
                    raise RunError(f"all trials failed; the first: {results[0].error}")
                picture = sweep.dir.path / "sweep.png"
                save_plot(done, space, picture, title=f"Sweep of {sweep.dir.path.name}")
                best = done[0]
                safe_print(f"Best: trial {best.trial}, {describe(best.values)}: {_loss(best)}")
                safe_print(f"Picture: {picture.as_posix()}; all trials: results.csv beside it")
                if args.final:
                    _print_final(sweep.run_final(best))
                else:
                    safe_print(
                        "Trials were compared on this text, so a loss to quote is another one: the "
                        "same command with --final trains the best trial on the full training part "
                        "and evaluates it on the test tail."
                    )
        except (KeyboardInterrupt, Terminated):
            command = "the same command without --restart" if args.restart else "the same command"
            print_stderr(f"note: {command} resumes the sweep")
            raise
    return 0


def _method(args: SweepConfig) -> tuple[str, Sequence[str]]:
    """The one method that was chosen, and what to search."""
    chosen = [name for name in METHODS if getattr(args, name)]
    if len(chosen) != 1:
        raise UserError(
            "give one of --grid, --random and --tpe with what to search, such as "
            "--grid max_lr=1e-3,2e-3"
        )
    for name, minimum in (("trials", 1), ("seeds", 1), ("jobs", 0)):
        if getattr(args, name) < minimum:
            raise UserError(f"--{name} must be {minimum} or more, not {getattr(args, name)}")
    return chosen[0], getattr(args, chosen[0])


def _request(
    args: SweepConfig, explicit: frozenset[str], method: str, space: Space
) -> "SweepRequest":
    """Check the configurations of all trials, as far as they are known."""
    from gptforge.builders.auto_config import resolve_auto
    from gptforge.builders.recipe import RECIPE_FIELDS
    from gptforge.builders.resolve import MODEL_FIELDS, resolve_init_from
    from gptforge.sweep.search import SweepRequest

    if args.preset == AUTO and args.time_limit and "max_steps" not in explicit:
        raise UserError(
            "--preset auto would fit the steps of each trial to --time_limit: give --max_steps"
        )
    out_dir = args.out_dir or f"sweeps/{_default_name(args)}"
    base = resolve_init_from(merge(args, {"out_dir": out_dir}, source="flags"), explicit)
    recipe_fields = RECIPE_FIELDS if args.preset == AUTO else frozenset()
    if args.init_from:
        recipe_fields -= {*MODEL_FIELDS, "tokenizer", "context_length"}

    def resolve(values: Values) -> tuple[Config, frozenset[str]]:
        fixed = explicit | values.keys()
        config = resolve_preset(merge(base, values, source=f"--{method}"), fixed)
        return resolve_auto(config, fixed, device=args.device), fixed | recipe_fields

    config, _ = resolve({})
    with log_to(lambda text: None):
        for values in _trials(args, method, space):
            try:
                validate(resolve(values)[0])
            except UserError as error:
                raise UserError(f"--{method}: trial {describe(values)}: {error}") from None
        max_config, _ = resolve(largest(space))
    return SweepRequest(
        config=config,
        largest=max_config,
        explicit=explicit,
        resolve=log_to(lambda text: None)(resolve),
        method=method,  # type: ignore[arg-type]
        space=space,
        trials=args.trials,
        seeds=args.seeds,
        jobs=args.jobs,
    )


def _trials(args: SweepConfig, method: str, space: Space) -> Iterator[Values]:
    """Values to check before anything runs: those of all trials, or the ends of ranges."""
    if method == "grid":
        return grid_search(space)
    if method == "random":
        return random_search(space, args.trials, args.seed)
    return ({name: value} for name, dim in space.items() for value in dim.values)


def _default_name(args: SweepConfig) -> str:
    text = Path(args.input.rstrip("/")).stem if args.input else ""
    return f"{text}-{args.preset}" if text else args.preset


def _loss(result: "TrialResult") -> str:
    spread = f" ± {result.spread:.4f}" if len(result.losses) > 1 else ""
    return f"held-out loss {result.loss:.4f}{spread} at step {result.step:,}"


def _print_final(result: "TrialResult") -> None:
    safe_print(
        f"Test tail: {result.loss:.4f} ± {result.spread:.4f} nats per token, "
        f"{result.bits_per_byte:.4f} bits per byte, after {result.step:,} steps; mean and standard "
        f"deviation over {len(result.losses)} seeds that no trial had"
    )
