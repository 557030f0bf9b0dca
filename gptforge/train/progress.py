"""How far a run has come, and putting its parts back to where a checkpoint left them."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.tensors import (
    Tensors,
    load_generator_tensors,
    load_model_tensors,
    load_optimizer_tensors,
)
from gptforge.data.loader import Loader
from gptforge.distributed import ALONE, Ranks
from gptforge.train.step import TrainStep


@dataclass
class Progress:
    """The counters of a run; they travel in every checkpoint."""

    step: int = 0
    """Updates made."""
    loss: float = math.nan
    """Mean training loss of the last update."""
    best_loss: float = math.inf
    """Lowest loss judged: held out, or training where nothing is."""
    best_step: int = 0
    """Updates made when it was judged."""
    loss_sum: float = 0.0
    """Training losses since the last judgement, summed."""
    loss_count: float = 0.0
    """How many they are; those that were no number do not count."""
    returns: int = 0
    """Times that training went back to a checkpoint because the loss broke down."""
    unjudged: int = 0
    """1: it was told to stop in the closing evaluation, which is still to be made."""
    seconds: float = 0.0
    """Wall time of training, over all sessions."""

    def to_json(self) -> dict[str, Any]:
        """The counters; what JSON cannot say, infinity and no number, is null."""
        return {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Progress":
        """Read what `to_json` wrote."""
        return cls(**{name: value for name, value in record.items() if value is not None})


def restore(path: Path, step: TrainStep, loader: Loader, ranks: Ranks = ALONE) -> Progress:
    """Put weights, optimizer, scaler, loader and dice back to a checkpoint; gives its counters.

    Rank 0 reads, and tells the others: they may have no such folder.
    """
    source = path.as_posix()

    def read(name: str) -> Tensors:
        return checkpoints.read_tensors(path, name) if ranks.is_first else {}

    load_model_tensors(step.model, read(checkpoints.MODEL), source=source, ranks=ranks)
    moments = read(checkpoints.OPTIMIZER)
    load_optimizer_tensors(step.model, step.optimizer, moments, source=source, ranks=ranks)
    state = ranks.on_first(lambda: checkpoints.read_state(path))
    loader.load_state_dict(state["loader"])
    step.load_scaler_state(state["scaler"])
    load_generator_tensors(read(checkpoints.GENERATORS), step.device, ranks)
    return Progress.from_json(state["progress"])
