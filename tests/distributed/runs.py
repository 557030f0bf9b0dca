"""Trains a tiny model on any number of ranks and compares the runs."""

import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_tensors
from gptforge.config import Config
from gptforge.distributed import SINGLE_PROCESS, Comm
from tests.distributed.spawn import on_ranks
from tests.training.runs import StopAfter, events, last


def run(comm: Comm, config: dict, stop_after: int = 0, stopping_rank: int = 0) -> str:
    trainer = build_trainer(Config(**config), explicit=(), comm=comm)
    if stop_after and comm.rank == stopping_rank:
        trainer.stop_signal = StopAfter(stop_after)
    return trainer.fit()


def train(world_size: int, config: Config, *args: int) -> set[str]:
    """The reasons for which the ranks stopped."""
    if world_size == 1:
        return {run(SINGLE_PROCESS, vars(config), *args)}
    return set(on_ranks(world_size, run, vars(config), *args))


def assert_same_run(first: Config, second: Config, *, exactly: bool = False) -> None:
    # The gradient of a key's bias is 0 up to rounding, which Adam amplifies.
    tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 2e-5}
    for kind, names in (("train", ("step", "loss", "norm")), ("eval", ("step", "val_loss"))):
        left, right = events(first, kind), events(second, kind)
        assert len(left) == len(right) > 0
        for a, b in zip(left, right, strict=True):
            pair = [torch.tensor([event[name] for name in names]) for event in (a, b)]
            torch.testing.assert_close(*pair, **tolerance)
    for file in ("model", "optimizer"):
        left, right = (read_tensors(last(c), f"{file}.safetensors") for c in (first, second))
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(left[name], right[name], **tolerance)
