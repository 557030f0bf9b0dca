"""Several ranks train as one process does, up to rounding."""

import dataclasses

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.resolve_run import check_global_batch
from gptforge.checkpoint.format import read_tensors
from gptforge.config import Config
from gptforge.data.dataloader import DataLoader
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.training.parallel import grad_reducer
from gptforge.training.train_step import TrainStep
from tests.conftest import TINY
from tests.distributed.runs import assert_same_run, train
from tests.distributed.spawn import on_ranks
from tests.training.runs import events, last

FLOAT32 = Precision(torch.float32, "")
both_backends = pytest.mark.parametrize("manual", [True, False], ids=["manual", "autograd"])


def test_two_and_four_ranks_train_as_one_process(config, tmp_path) -> None:
    train(1, config)
    for world_size in (2, 4):
        other = dataclasses.replace(config, out_dir=str(tmp_path / f"run-{world_size}"))
        assert train(world_size, other) == {"finished"}
        assert [event["step"] for event in events(other, "train")] == list(range(20))
        assert_same_run(config, other)


def test_run_resumes_with_another_number_of_ranks(config, tmp_path) -> None:
    train(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "changing"))
    assert train(2, other, 7) == {"interrupted"}
    assert last(other).name == "step-000007"
    assert train(4, other, 5) == {"interrupted"}
    assert train(1, other) == {"finished"}
    assert_same_run(config, other)


def test_resume_with_dropout_restores_the_rng_of_every_rank(config, tmp_path) -> None:
    config = dataclasses.replace(config, dropout=0.2)
    train(2, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "resumed"))
    train(2, other, 7)
    train(2, other)
    assert_same_run(config, other, exactly=True)
    rng_state = read_tensors(last(config), "rng.safetensors")
    assert not torch.equal(rng_state["cpu"], rng_state["cpu.1"])


def test_stop_on_one_rank_stops_all_after_the_same_step(config) -> None:
    assert train(2, config, 4, 1) == {"interrupted"}
    assert last(config).name == "step-000004"


def batch(comm: Comm, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a batch that is the same for any number of ranks."""
    tokens = torch.randint(0, 64, (rows, 17), generator=torch.Generator().manual_seed(5))
    tokens = comm.local_rows(tokens)
    return tokens[:, :-1], tokens[:, 1:]


def make_step(comm: Comm, *, manual: bool, micro_batch: int = 1) -> TrainStep:
    grad_reducer.BUCKET_BYTES = 4096  # several buckets even for a tiny model
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    return TrainStep(
        model,
        build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1),
        Config(batch_size=micro_batch),
        precision=FLOAT32,
        kernels=KernelConfig(manual_backward=True) if manual else DEFAULT_KERNELS,
        halve_on_oom=True,
        comm=comm,
    )


def weights(step: TrainStep) -> list[float]:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()]).tolist()


def five_steps(comm: Comm, manual: bool) -> list:
    step = make_step(comm, manual=manual)
    losses_and_norms = [[float(x) for x in step(*batch(comm), lr=1e-2)] for _ in range(5)]
    return [losses_and_norms, weights(step)]


@both_backends
def test_gradients_are_summed_over_the_ranks(manual) -> None:
    expected, expected_weights = map(torch.tensor, five_steps(SINGLE_PROCESS, manual))
    for losses, final in on_ranks(4, five_steps, manual):
        torch.testing.assert_close(torch.tensor(losses), expected)
        torch.testing.assert_close(torch.tensor(final), expected_weights, rtol=1e-5, atol=1e-4)


def record_buckets(comm: Comm, manual: bool) -> list:
    """Micro-batch, gradients ready and size of each bucket as it is sent."""
    step = make_step(comm, manual=manual)
    micro_batch, ready, sent = 0, 0, []
    all_reduce, forward_backward, reducer = (
        comm.all_reduce_async,
        step.backend.forward_backward,
        step.reducer,
    )

    def count_micro_batches(*args):
        nonlocal micro_batch
        micro_batch += 1
        return forward_backward(*args)

    def record_ready(groups: int) -> None:
        nonlocal ready
        ready = groups
        type(reducer).grads_ready(reducer, groups)

    def record_sent(tensor):
        sent.append([micro_batch, ready, tensor.numel()])
        return all_reduce(tensor)

    step.backend.forward_backward, comm.all_reduce_async = count_micro_batches, record_sent
    if manual:
        step.backend.on_grads_ready = record_ready
    else:
        step.backend._grads.on_grads_ready = record_ready
    step(*batch(comm), lr=1e-2)
    return [sent, sum(p.numel() for p in step.model.parameters())]


@both_backends
def test_all_reduce_overlaps_the_last_backward_only(manual) -> None:
    for sent, num_params in on_ranks(2, record_buckets, manual):
        assert {micro_batch for micro_batch, _, _ in sent} == {4}
        assert len({ready for _, ready, _ in sent}) >= 2
        assert sum(size for _, _, size in sent) >= num_params


def nan_on_rank1(comm: Comm, manual: bool) -> list:
    """One good step, and one in which rank 1 computes NaN."""
    step = make_step(comm, manual=manual)
    step(*batch(comm), lr=1e-2)
    before = weights(step)
    forward_backward = step.backend.forward_backward
    step.backend.forward_backward = lambda x, y, scale: forward_backward(
        x, y, float("nan") if comm.rank == 1 else scale
    )
    loss, norm = step(*batch(comm), lr=1e-2)
    return [weights(step) == before, str(float(loss)), str(float(norm))]


@both_backends
def test_nan_on_one_rank_skips_the_step_on_all(manual) -> None:
    first, second = on_ranks(2, nan_on_rank1, manual)
    assert first == second
    assert first[0] is True
    assert first[2] == "nan"


def out_of_memory_on_rank1(comm: Comm, manual: bool, late: bool) -> list:
    """Rank 1 runs out of memory in the second step, before or after it sent anything."""
    step = make_step(comm, manual=manual, micro_batch=2)
    step(*batch(comm), lr=1e-2)
    before = weights(step)
    forward_backward, calls = step.backend.forward_backward, 0

    def fail_once(*args):
        nonlocal calls
        calls += 1
        if comm.rank == 1 and calls == 2 and not late:
            raise torch.OutOfMemoryError("no memory")
        loss = forward_backward(*args)
        if comm.rank == 1 and calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return loss

    step.backend.forward_backward = fail_once
    loss, _ = step(*batch(comm), lr=1e-2)
    second = weights(step)
    step(*batch(comm), lr=1e-2)
    return [second == before, float(loss), second, weights(step), step.micro_batch_size]


@both_backends
def test_out_of_memory_on_one_rank_does_not_change_the_step(manual) -> None:
    expected, _ = five_steps(SINGLE_PROCESS, manual)
    first, second = on_ranks(2, out_of_memory_on_rank1, manual, False)
    assert first[:4] == second[:4]
    assert first[0] is False
    assert first[1] == pytest.approx(expected[1][0], rel=1e-5)
    assert (first[4], second[4]) == (2, 1)


@both_backends
def test_out_of_memory_too_late_skips_the_step_on_all(manual) -> None:
    first, second = on_ranks(2, out_of_memory_on_rank1, manual, True)
    assert first[0] is second[0] is True
    assert first[2:4] == second[2:4]
    assert second[4] == 1


def evaluate(comm: Comm) -> list:
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    tokens = torch.arange(16 * 11 + 5).numpy() % 60
    evaluator = ValEvaluator(tokens, tokens * 0 + 1, context_length=16, batch_size=3)
    score = evaluator.evaluate(model, FLOAT32, comm)
    return [score.loss, score.bits_per_byte, score.num_tokens, score.num_bytes]


def test_evaluation_over_several_ranks_gives_the_same_loss() -> None:
    expected = evaluate(SINGLE_PROCESS)
    for score in on_ranks(4, evaluate):
        assert score == pytest.approx(expected, rel=1e-6)


def stop_evaluation(comm: Comm) -> list:
    """Rank 1 stops in its third batch; after which batch each rank does."""
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    evaluator = ValEvaluator(
        torch.zeros(16 * 40).numpy().astype("uint16"), torch.ones(64).numpy().astype("int64"),
        context_length=16, batch_size=1,
    )  # fmt: skip
    batches: list[int] = []

    def should_stop() -> bool:
        batches.append(1)
        return comm.rank == 1 and len(batches) >= 3

    score = evaluator.evaluate(model, FLOAT32, comm, should_stop=should_stop)
    return [not score.is_complete, len(batches)]


def test_stop_on_one_rank_ends_an_evaluation_on_all_after_the_same_batch() -> None:
    assert on_ranks(2, stop_evaluation) == [[True, 5], [True, 5]]


def compare_texts(comm: Comm) -> str:
    try:
        comm.assert_same({"text": "this" if comm.rank != 2 else "that"})
    except UserError as error:
        return str(error)
    return ""


def test_rank_with_another_text_is_named() -> None:
    messages = on_ranks(3, compare_texts)
    assert "rank 2 on " in messages[0]
    assert "has another text than rank 0: that, not this" in messages[0]
    assert len(set(messages)) == 1


def test_ranks_compare_their_flags_and_not_what_rank0_resolved(config) -> None:
    compared: dict[str, str] = {}

    class SecondRank(Comm):
        def broadcast_from_rank0(self, compute):
            result = compute()
            is_config = isinstance(result, dict) and "max_lr" in result
            return result | {"max_lr": 1e-3} if is_config else result

        def assert_same(self, values):
            compared.update(values)

    config = dataclasses.replace(config, max_lr=0.5)
    trainer = build_trainer(config, explicit=(), comm=SecondRank())
    assert trainer is not None and trainer.config.max_lr == 1e-3
    trainer.lock.release()
    assert compared["--max_lr"] == "0.5"


def test_ranks_load_the_rows_that_one_process_would() -> None:
    tokens = torch.arange(400).numpy().astype("uint16")

    def rows(rank: int, world_size: int) -> torch.Tensor:
        loader = DataLoader(
            tokens, context_length=7, global_batch_size=8, seed=1, shuffle=True,
            device=torch.device("cpu"), rank=rank, world_size=world_size,
        )  # fmt: skip
        return torch.stack([loader.next_batch()[0] for _ in range(9)], 1)

    for size in (2, 4):
        assert torch.equal(torch.cat([rows(rank, size) for rank in range(size)]), rows(0, 1))


class ThreeRanks(Comm):
    world_size = 3


def test_indivisible_global_batch_is_refused_with_a_hint() -> None:
    config = dataclasses.replace(Config(), batch_size=8, gradient_accumulation_steps=5)
    with pytest.raises(UserError, match="40 sequences, which does not divide by 3") as caught:
        check_global_batch(config, ThreeRanks())
    assert "use 2, 4, 5, 8, 10, 20, 40 ranks" in str(caught.value)
    assert "--gradient_accumulation_steps 6" in str(caught.value)
    check_global_batch(dataclasses.replace(config, gradient_accumulation_steps=6), ThreeRanks())
