"""The state of a run: its counters, and saving and restoring all parts of a training process."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint import state_dict as state_dicts
from gptforge.config import Config
from gptforge.data.dataloader import DataLoader
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError, parsing
from gptforge.optim.schedule import stable_end
from gptforge.report.format import ValLoss
from gptforge.training.train_step import TrainStep

MAX_RECENT_LOSSES = 1000  # training losses kept for an evaluation without validation data
AUTO_PATIENCE = 5  # evaluations without a better held-out loss after which training stops
# Those evaluations cover at least this fraction of max_steps, since loss curves have plateaus.
AUTO_FRACTION = 0.2
MAX_REPEATS = 4.0  # up to about 4 epochs are as good as new text (Muennighoff et al., 2023)

PARTIAL_KEYS = {
    "windows": "sequences_done",
    "num_windows": "num_sequences",
    "nats": "total_nats",
    "tokens": "num_tokens",
    "bytes": "num_bytes",
    "chars": "num_chars",
}
"""Keys of an unfinished evaluation in state.json, with the fields of `ValLoss`."""


@dataclass
class TrainState:
    """The counters of a run; they are part of every checkpoint."""

    step: int = 0  # steps completed
    loss: float = math.nan  # mean training loss of the last step
    best_loss: float = math.inf  # lowest validation loss, or training loss without validation data
    best_step: int = 0  # step at which `best_loss` was evaluated
    # Evaluations since then, or since max_steps was raised; those before wsd's decay excluded.
    evals_since_best: int = 0
    # Training losses of the last steps; their mean is evaluated without validation data.
    recent_losses: list[float] = field(default_factory=list)
    rollbacks: int = 0  # rollbacks since the last good checkpoint after `diverged_at`
    diverged_at: int = 0  # the last step at which training had diverged before a rollback
    bad_steps: int = 0  # consecutive steps, up to this one, whose loss or gradient was not finite
    partial_eval: ValLoss | None = None  # of an interrupted evaluation at this step
    seconds: float = 0.0  # wall time of training, over all processes of this run

    def count_eval(self, config: Config, loss: float) -> bool:
        """Count an evaluation with this loss; returns whether it is the best so far."""
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.evals_since_best = loss, self.step, 0
        elif self.step > (stable_end(config) or 0):
            # With wsd the loss may be level before the decay and fall during it.
            self.evals_since_best += 1
        return is_best

    def to_json(self) -> dict[str, Any]:
        """Return the counters for state.json; NaN and Inf become null."""
        record = asdict(self)
        # On-disk keys predate the field names; renaming them would break old checkpoints.
        losses, partial = record.pop("recent_losses"), record.pop("partial_eval")
        record["returns"] = record.pop("rollbacks")  # the key since version 0.1
        if partial is not None:
            partial = {key: partial[name] for key, name in PARTIAL_KEYS.items()}
        return {
            "progress": {name: _finite_or_none(value) for name, value in record.items()},
            "pending": ["evaluate"] if partial else [],
            "partial": partial,
            "recent_losses": [_finite_or_none(loss) for loss in losses],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """Read the record of `to_json`, of this version or of version 0.1."""
        record = {name: value for name, value in state["progress"].items() if value is not None}
        losses = [math.nan if loss is None else loss for loss in state.get("recent_losses", ())]
        partial, pending = state.get("partial"), state.get("pending", ())
        # Version 0.1 had a sum of losses, and a flag for an interrupted final evaluation.
        count, total = int(record.pop("loss_count", 0)), record.pop("loss_sum", 0.0)
        if count and not losses:
            losses = [total / count] * min(count, MAX_RECENT_LOSSES)
        partial_eval = None
        if record.pop("unjudged", 0) or "evaluate" in pending:
            partial_eval = ValLoss(0.0, 0, 0, 0, sequences_done=0)
        if partial is not None and "chars" in partial:  # which version 0.1 did not count
            partial_eval = ValLoss(**{PARTIAL_KEYS[key]: n for key, n in partial.items()})
        record["rollbacks"] = record.pop("returns", 0)
        return cls(**record, recent_losses=losses, partial_eval=partial_eval)


def resolve_patience(config: Config, *, train_tokens: int, has_val: bool) -> int:
    """Evaluations without a better held-out loss after which to stop; 0: never."""
    if config.patience > 0 and not has_val:
        raise UserError(
            f"--patience {config.patience} compares held-out losses, and no text is held out: "
            "leave it out, or hold out text with --val_fraction"
        )
    if config.patience >= 0:
        return config.patience
    epochs = config.max_steps * config.tokens_per_step / train_tokens
    if not has_val or epochs <= MAX_REPEATS or config.preset.startswith("gpt2"):
        return 0
    return max(AUTO_PATIENCE, math.ceil(AUTO_FRACTION * config.max_steps / config.eval_every))


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def snapshot(
    state: TrainState, step_fn: TrainStep, dataloader: DataLoader, comm: Comm, **extra: Any
) -> checkpoints.Snapshot:
    """Copy the full training state; a collective. `extra` are more entries of state.json."""
    record = {
        "version": 1,
        **state.to_json(),
        "loader": dataloader.state_dict(),
        # The loss scale: starting from the default again would skip steps until it fits.
        "scaler": step_fn.scaler_state_dict(),
        **extra,
    }
    model, optimizer = step_fn.model, step_fn.optimizer
    # The weights to use are those of the model: the EMA, if there is one.
    with step_fn.ema_weights():
        return checkpoints.Snapshot(
            state_dicts.model_state_dict(model, comm),
            state_dicts.optimizer_state_dict(model, optimizer, comm, step_fn.raw_weights),
            state_dicts.rng_state_dict(step_fn.device, comm),
            record,
        )


def restore(
    path: Path, step_fn: TrainStep, dataloader: DataLoader, comm: Comm = SINGLE_PROCESS
) -> TrainState:
    """Restore weights, optimizer, scaler, dataloader and RNG state; returns the counters.

    Rank 0 reads the checkpoint and sends it to the others, which may not have the folder.
    """
    source = path.as_posix()

    def read(name: str) -> state_dicts.StateDict:
        return checkpoints.read_tensors(path, name) if comm.is_main else {}

    with step_fn.ema_weights():
        model = step_fn.model
        state_dicts.load_model_state_dict(model, read(checkpoints.MODEL), source=source, comm=comm)
        state_dicts.load_optimizer_state_dict(
            model, step_fn.optimizer, read(checkpoints.OPTIMIZER),
            source=source, comm=comm, raw_weights=step_fn.raw_weights,
        )  # fmt: skip
    state = comm.broadcast_from_rank0(lambda: checkpoints.read_state(path))
    dataloader.load_state_dict(state["loader"])
    with parsing(path / checkpoints.STATE, "a state that a run saved"):
        step_fn.load_scaler_state_dict(state["scaler"])
        train_state = TrainState.from_json(state)
    # Last: anything that draws random numbers would advance the restored generators.
    rng_state = read(checkpoints.RNG_STATE)
    state_dicts.load_rng_state_dict(rng_state, step_fn.device, comm, source=source)
    if step_fn.ema is not None:
        step_fn.ema.num_updates = train_state.step
    return train_state
