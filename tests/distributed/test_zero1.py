"""ZeRO-1 gathers weights once per step and reduce-scatters gradients with the last micro-batch."""

import dataclasses
from unittest import mock

import pytest
import torch

from gptforge.builders import build_train_step, memory_fit
from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.memory_fit import fits_zero1
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.distributed.dtensor import gather_full_tensor, local_tensor
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.training.dry_run import dry_run
from gptforge.training.parallel.fsdp import apply_fsdp
from gptforge.training.train_step import TrainStep
from tests.conftest import TINY
from tests.distributed.runs import assert_same_run, train
from tests.distributed.spawn import on_ranks
from tests.distributed.test_ddp import batch
from tests.training.runs import StopAfter, last

DTYPES = {name: Precision(getattr(torch, name), "") for name in ("float32", "bfloat16")}
DTYPES["fp8"] = Precision(torch.bfloat16, "", float8=True)
BACKEND = "manual backward, sharded"
ROWS = 12
"""Of a batch that 1, 2, 3 and 4 ranks can share."""


def make_step(
    comm: Comm, width: int = 16, recompute: bool = False, dtype: str = "float32"
) -> TrainStep:
    precision = DTYPES[dtype]
    model = GPT(dataclasses.replace(TINY, n_embd=width))
    model.init_weights(torch.Generator().manual_seed(0))
    root = apply_fsdp(model, precision, comm) if comm.world_size > 1 else None
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    return TrainStep(
        model,
        optimizer,
        Config(batch_size=1, activation_checkpointing=recompute),
        precision=precision,
        kernels=KernelConfig(manual_backward=True, float8=precision.float8),
        comm=comm,
        root=root,
    )


@torch.no_grad()
def evaluate(step: TrainStep, comm: Comm) -> float:
    step.root_module.eval()
    return float(comm.all_reduce(step.root_module(*batch(comm, ROWS)).detach().clone()))


def five_steps(comm: Comm, width: int, recompute: bool, dtype: str) -> list:
    """Loss, norm and evaluation of each step, and the final weights on rank 0."""
    step, results = make_step(comm, width, recompute, dtype), []
    # Now: after an evaluation, the root module has its unsharded parameters.
    parameters = list(step.model.parameters())
    for _ in range(5):
        loss, norm = step(*batch(comm, ROWS), lr=1e-2)
        results.append([float(loss), float(norm), evaluate(step, comm)])
    full = [gather_full_tensor(p, comm) for p in parameters]
    weights = [x for tensor in full if tensor is not None for x in tensor.flatten().tolist()]
    return [step.backend_name, results, weights]


@pytest.mark.parametrize(
    ("world_size", "width", "recompute", "dtype"),
    [
        (2, 16, False, "float32"),
        (3, 14, False, "float32"),  # indivisible by the number of ranks
        (3, 14, True, "bfloat16"),
    ],
)
def test_zero1_trains_as_one_process(world_size, width, recompute, dtype) -> None:
    _, expected, expected_weights = five_steps(SINGLE_PROCESS, width, recompute, dtype)
    expected = torch.tensor(expected)
    # One process evaluates in float32 here, ZeRO-1 in the compute dtype.
    tolerance = {"rtol": 1e-3, "atol": 0} if dtype == "bfloat16" else {}
    all_ranks = on_ranks(world_size, five_steps, width, recompute, dtype)
    for rank, (backend, results, weights) in enumerate(all_ranks):
        assert backend == BACKEND
        results = torch.tensor(results)
        torch.testing.assert_close(results[:, :2], expected[:, :2])
        torch.testing.assert_close(results[:, 2], expected[:, 2], **tolerance)
        if not rank:
            torch.testing.assert_close(
                torch.tensor(weights), torch.tensor(expected_weights), rtol=1e-5, atol=1e-4
            )


def test_fp8_casts_the_gathered_weights() -> None:
    """They are rounded to bfloat16 on their way, and so are not exactly those of one process."""
    _, expected, _ = five_steps(SINGLE_PROCESS, 16, False, "fp8")
    for backend, results, _ in on_ranks(2, five_steps, 16, False, "fp8"):
        assert backend == "manual backward, fp8, sharded"
        torch.testing.assert_close(results[0][:2], expected[0][:2], rtol=2e-2, atol=0)
        losses, expected_losses = ([row[0] for row in rows] for rows in (results, expected))
        torch.testing.assert_close(losses, expected_losses, rtol=2e-2, atol=0)


def run(comm: Comm, config: dict, stop_after: int = 0) -> str:
    """A run as on GPUs, on the CPU."""
    kernels = KernelConfig(manual_backward=True)
    with mock.patch.object(build_train_step, "select_kernels", lambda *_, **__: kernels):
        trainer = build_trainer(Config(**config), explicit=(), comm=comm)
    assert trainer.step_fn.backend_name == BACKEND
    if stop_after and comm.is_main:
        trainer.stop_signal = StopAfter(stop_after)
    return trainer.fit()


def test_run_evaluates_samples_saves_and_resumes_under_any_parallelism(config, tmp_path) -> None:
    config = dataclasses.replace(config, max_steps=9, eval_every=3, save_every=9, sample_every=4)
    train(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "zero1"), parallel="fsdp")
    assert set(on_ranks(2, run, vars(other), 4)) == {"interrupted"}
    assert last(other).name == "step-000004"
    train(1, dataclasses.replace(other, parallel="auto"), 2)
    assert set(on_ranks(4, run, vars(other))) == {"finished"}
    assert_same_run(config, other)


def test_resumed_run_is_bitwise_equal(config, tmp_path) -> None:
    config = dataclasses.replace(config, max_steps=7, dropout=0.1, parallel="fsdp")
    on_ranks(2, run, vars(config))
    other = dataclasses.replace(config, out_dir=str(tmp_path / "resumed"))
    on_ranks(2, run, vars(other), 3)
    on_ranks(2, run, vars(other))
    assert_same_run(config, other, exactly=True)


def record_collectives(comm: Comm) -> list:
    """Each collective of a step with its micro-batch; 0 is before the first one."""
    step, sent, micro_batch = make_step(comm), [], [0]
    forward_backward = step.backend.forward_backward

    def count_micro_batches(*args: object) -> torch.Tensor:
        micro_batch[0] += 1
        return forward_backward(*args)

    step.backend.forward_backward = count_micro_batches
    for name in ("all_gather_async", "reduce_scatter_async", "all_reduce_async"):

        def record(tensor: torch.Tensor, name: str = name):
            sent.append((name, micro_batch[0]))
            return getattr(Comm, name)(comm, tensor)

        setattr(comm, name, record)
    step(*batch(comm, ROWS), lr=1e-2)
    return sent


def test_weights_are_gathered_once_and_gradients_reduced_in_the_last_micro_batch() -> None:
    num_matrices = 2 + 4 * TINY.n_layer
    for sent in on_ranks(2, record_collectives):
        when = {kind: [at for name, at in sent if name == kind] for kind, _ in sent}
        # All vectors share one message.
        assert when["all_gather_async"] == [0] * (1 + num_matrices)
        last_micro_batch = ROWS // 2
        assert when["reduce_scatter_async"] == [last_micro_batch] * num_matrices
        assert set(when["all_reduce_async"]) == {last_micro_batch}


def nan_on_rank1(comm: Comm) -> list:
    step = make_step(comm)
    step(*batch(comm, ROWS), lr=1e-2)
    parameters = [p for group in step.optimizer.param_groups for p in group["params"]]
    moments = [step.optimizer.state[p]["exp_avg"] for p in parameters]
    total = sum(p.numel() for p in parameters)
    fractions = [
        sum(local_tensor(t).numel() for t in group) / total for group in (parameters, moments)
    ]
    before = [local_tensor(p).clone() for p in parameters]
    forward_backward = step.backend.forward_backward
    step.backend.forward_backward = lambda x, y, scale: forward_backward(
        x, y, float("nan") if comm.rank == 1 else scale
    )
    _, norm = step(*batch(comm, ROWS), lr=1e-2)
    same = all(torch.equal(local_tensor(p), b) for p, b in zip(parameters, before, strict=True))
    return [*fractions, same, str(float(norm))]


def test_each_rank_holds_one_shard_and_nan_on_one_skips_the_step_on_all() -> None:
    for weights, moments, same, norm in on_ranks(2, nan_on_rank1):
        assert weights == moments == 0.5
        assert (same, norm) == (True, "nan")


class TwoRanks(Comm):
    world_size = 2


def test_zero1_is_used_only_where_full_weights_fit(monkeypatch) -> None:
    config = dataclasses.replace(Config(), vocab_size=50304, n_layer=48, n_embd=1600, n_head=25)
    gpu = torch.device("cuda", 0)
    for free, expected in ((80e9, True), (40e9, True), (24e9, False)):
        monkeypatch.setattr(memory_fit, "usable_memory", lambda device, free=free: int(free))
        assert fits_zero1(config, gpu, (), TwoRanks()) is expected
    monkeypatch.setattr(memory_fit, "usable_memory", lambda device: int(40e9))
    large = dataclasses.replace(config, batch_size=32)
    assert not fits_zero1(large, gpu, ("batch_size",), TwoRanks())


def steps_and_dry_runs(comm: Comm) -> list:
    step, results = make_step(comm), []
    for _ in range(3):
        results.append([float(x) for x in step(*batch(comm, ROWS), lr=1e-2)])
        dry_run(step, 1, 16)
    return results


def test_dry_run_between_steps_changes_nothing() -> None:
    expected = torch.tensor(steps_and_dry_runs(SINGLE_PROCESS))
    for results in on_ranks(2, steps_and_dry_runs):
        torch.testing.assert_close(torch.tensor(results), expected)
