"""Whole runs of a tiny model on any number of ranks, and comparing them."""

import torch

from gptforge.builders import build_trainer
from gptforge.checkpoint.store import read_tensors
from gptforge.config import Config
from gptforge.distributed import SINGLE_PROCESS, Comm
from tests.distributed.spawn import on_ranks
from tests.train.runs import StopAfter, events, last


def run(ranks: Comm, values: dict, stop_after: int = 0, stopping: int = 0) -> str:
    """A run; `stopping` is the rank that wishes to stop."""
    trainer = build_trainer(Config(**values), explicit=(), log=lambda _: None, comm=ranks)
    if stop_after and ranks.rank == stopping:
        trainer.stop_signal = StopAfter(stop_after)
    return trainer.fit()


def on(count: int, config: Config, *args: int) -> set[str]:
    return set(on_ranks(count, run, vars(config), *args)) if count > 1 else {
        run(SINGLE_PROCESS, vars(config), *args)
    }  # fmt: skip


def assert_same_run(one: Config, other: Config, *, bits: bool = False) -> None:
    # The gradient of a key's bias is nought but for rounding, which Adam blows up.
    tolerance = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-5, "atol": 2e-5}
    for kind, names in (("train", ("step", "loss", "norm")), ("eval", ("step", "val_loss"))):
        left, right = events(one, kind), events(other, kind)
        assert len(left) == len(right) > 0
        for a, b in zip(left, right, strict=True):
            pair = [torch.tensor([e[name] for name in names]) for e in (a, b)]
            torch.testing.assert_close(*pair, **tolerance)
    for file in ("model", "optimizer"):
        left, right = (read_tensors(last(c), f"{file}.safetensors") for c in (one, other))
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], **tolerance)
