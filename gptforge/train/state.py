"""How far a run has come, and putting its parts back to where a checkpoint left them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.state_dict import (
    StateDict,
    load_model_state_dict,
    load_optimizer_state_dict,
    load_rng_state_dict,
)
from gptforge.data.dataloader import DataLoader
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import parsing
from gptforge.evaluate.val_loss import PartialValLoss
from gptforge.train.train_step import TrainStep

Action = Literal["evaluate", "sample", "save"]
MAX_RECENT_LOSSES = 1000
"""Training losses that are kept for an evaluation without held-out text."""


@dataclass
class TrainState:
    """The counters of a run; they travel in every checkpoint."""

    step: int = 0
    """Updates made."""
    loss: float = math.nan
    """Mean training loss of the last update."""
    best_loss: float = math.inf
    """Lowest loss evaluated: held-out, or training where nothing is held out."""
    best_step: int = 0
    """Updates made when it was evaluated."""
    recent_losses: list[float] = field(default_factory=list)
    """Training losses of the last steps, where nothing is held out: their mean is evaluated."""
    rollbacks: int = 0
    """Rollbacks to a checkpoint since the last one that lies behind `diverged_at`."""
    diverged_at: int = 0
    """The furthest step at which training had diverged before a rollback."""
    bad_steps: int = 0
    """Steps in a row, up to this one, whose loss or gradient was NaN or Inf."""
    pending: list[Action] = field(default_factory=list)
    """What is due at this step and not done yet, in this order."""
    partial: PartialValLoss | None = None
    """How far the pending evaluation got."""
    seconds: float = 0.0
    """Wall time of training, over all sessions."""

    def to_json(self) -> dict[str, Any]:
        """The counters, as `state.json` holds them; NaN and infinity become null."""
        record = asdict(self)
        losses = record.pop("recent_losses")
        extra = {name: record.pop(name) for name in ("pending", "partial")}
        # The name it had in version 0.1.
        record["returns"] = record.pop("rollbacks")
        return {
            "progress": {name: _finite(value) for name, value in record.items()},
            **extra,
            "recent_losses": [_finite(loss) for loss in losses],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "TrainState":
        """Read what `to_json` wrote, or version 0.1."""
        record = {name: value for name, value in state["progress"].items() if value is not None}
        losses = [math.nan if loss is None else loss for loss in state.get("recent_losses", ())]
        partial, pending = state.get("partial"), list(state.get("pending", ()))
        # Version 0.1 kept a sum of losses, and a mark where the closing evaluation was stopped.
        count, total = int(record.pop("loss_count", 0)), record.pop("loss_sum", 0.0)
        if record.pop("unjudged", 0):
            pending = ["evaluate", "sample", "save"]
        return cls(
            **record | {"rollbacks": record.pop("returns", 0)},
            recent_losses=losses or [total / count] * min(count, MAX_RECENT_LOSSES)
            if count
            else losses,
            pending=pending,
            partial=None if partial is None else PartialValLoss(**partial),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def restore(
    path: Path, step: TrainStep, loader: DataLoader, comm: Comm = SINGLE_PROCESS
) -> TrainState:
    """Put weights, optimizer, scaler, loader and dice back to a checkpoint; gives its counters.

    Rank 0 reads, and tells the others: they may have no such folder.
    """
    source = path.as_posix()

    def read(name: str) -> StateDict:
        return checkpoints.read_tensors(path, name) if comm.is_main else {}

    load_model_state_dict(step.model, read(checkpoints.MODEL), source=source, comm=comm)
    moments = read(checkpoints.OPTIMIZER)
    load_optimizer_state_dict(step.model, step.optimizer, moments, source=source, comm=comm)
    state = comm.broadcast_from_rank0(lambda: checkpoints.read_state(path))
    loader.load_state_dict(state["loader"])
    with parsing(path / checkpoints.STATE, "a state that a run saved"):
        step.load_scaler_state_dict(state["scaler"])
    load_rng_state_dict(read(checkpoints.RNG_STATE), step.device, comm, source=source)
    return read_train_state(path, state)


def read_train_state(path: Path, state: Mapping[str, Any]) -> TrainState:
    """The counters in a checkpoint's state; a UserError if it has others."""
    with parsing(path / checkpoints.STATE, "a state that a run saved"):
        return TrainState.from_json(state)
