"""All ranks go from bfloat16 to fp8 at the same step."""

import dataclasses
from unittest import mock

import pytest

from gptforge import device
from gptforge.builders import build_train_step
from gptforge.builders.build_trainer import build_trainer
from gptforge.config import Config
from gptforge.distributed import Comm
from gptforge.kernel_select import KernelConfig
from gptforge.training.backends import cuda_graph
from tests.distributed.runs import assert_same_run
from tests.distributed.spawn import on_ranks
from tests.training.backends.test_cuda_graph import fake_capture
from tests.training.runs import StopAfter

BACKENDS = {"ddp": "manual backward, fp8, CUDA graph", "fsdp": "manual backward, fp8, sharded"}


def run(comm: Comm, config: dict, stop_after: int = 0) -> list[str]:
    """A run as on GPUs, on the CPU; returns why it ended, and the last backend."""
    kernels = KernelConfig(manual_backward=True, float8=True)
    with (
        mock.patch.object(device, "has_float8", lambda _: True),
        mock.patch.object(build_train_step, "select_kernels", lambda *_: kernels),
        mock.patch.object(cuda_graph, "_capture", fake_capture),
    ):
        trainer = build_trainer(Config(**config), explicit=(), comm=comm)
        if stop_after and comm.is_main:
            trainer.stop_signal = StopAfter(stop_after)
        return [trainer.fit(), trainer.step_fn.backend_name]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resumed_run_is_bitwise_equal(config, tmp_path, parallel) -> None:
    config = dataclasses.replace(
        config, dtype="fp8", warmup_steps=3, max_steps=6, eval_every=3, parallel=parallel
    )
    finished = ["finished", BACKENDS[parallel]]
    assert on_ranks(2, run, vars(config)) == [finished] * 2
    other = dataclasses.replace(config, out_dir=str(tmp_path / "resumed"))
    interrupted = ["interrupted", BACKENDS[parallel].replace(", fp8", "")]
    assert on_ranks(2, run, vars(other), 2) == [interrupted] * 2
    assert on_ranks(2, run, vars(other)) == [finished] * 2
    assert_same_run(config, other, exactly=True)
