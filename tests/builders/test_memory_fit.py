import dataclasses
from types import SimpleNamespace

import pytest
import torch

from gptforge.builders import memory_fit
from gptforge.config import Config
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import RunError
from gptforge.kernel_select import DEFAULT_KERNELS
from tests.training.steps import FLOAT32


@pytest.fixture
def find(monkeypatch):
    """Search from 32 sequences of 1 GB each, of which `limit` fit, on a GPU."""

    def find(limit: int, tried: list[int], *, free_memory: int = 10**12) -> int:
        def fits(step: object, size: int, context_length: int) -> bool:
            tried.append(size)
            return size <= limit

        monkeypatch.setattr(memory_fit, "fits_memory", fits)
        monkeypatch.setattr(memory_fit, "usable_memory", lambda device: free_memory)
        monkeypatch.setattr(
            memory_fit, "training_memory", lambda config, n, **_: {"all": n * 10**9}
        )
        step = SimpleNamespace(
            kernels=DEFAULT_KERNELS, device=torch.device("cuda"), is_sharded=False,
            precision=FLOAT32,
        )  # fmt: skip
        config = Config(batch_size=32)
        return memory_fit.choose_micro_batch(step, config, SINGLE_PROCESS, is_explicit=False)

    return find


def test_largest_that_fits_is_found(find) -> None:
    tried: list[int] = []
    assert find(9, tried) == 8
    assert tried == [32, 16, 8]


def test_the_estimate_rules_out_what_cannot_fit(find) -> None:
    tried: list[int] = []
    assert find(32, tried, free_memory=10 * 10**9) == 8
    assert tried == [8]


def test_nothing_fits(find) -> None:
    with pytest.raises(RunError, match="not even one sequence"):
        find(0, [])


def test_teachers_are_the_reason_for_copies_of_the_model(caplog) -> None:
    """The log said "as requested" without a request."""
    comm = Comm()
    comm.world_size = 2
    caplog.set_level("INFO", "gptforge")
    config = Config(teachers=1)
    assert not memory_fit.use_fsdp(config, torch.device("cpu"), FLOAT32, comm)
    assert caplog.messages[-1].endswith("2 ranks; teachers need a full copy on each")
    assert not memory_fit.use_fsdp(
        dataclasses.replace(config, parallel="ddp"), torch.device("cpu"), FLOAT32, comm
    )
    assert caplog.messages[-1].endswith("2 ranks; as requested")
