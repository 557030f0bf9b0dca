"""Updates of a model in shards, written out: put together once, learned from as one learns."""

import dataclasses
from unittest import mock

import pytest
import torch

from gptforge.builders import build_trainer, memory_fit, train_step
from gptforge.builders.memory_fit import fits_zero1
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.distributed.comm import DistributedComm
from gptforge.distributed.dtensor import gather_full_tensor, local_tensor
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.train.parallel.fsdp import apply_fsdp
from gptforge.train.savings import DEFAULT_SAVINGS, Savings
from gptforge.train.train_step import TrainStep
from tests.conftest import TINY
from tests.distributed.runs import assert_same_run, on
from tests.distributed.spawn import on_ranks
from tests.distributed.test_ddp import batch
from tests.train.runs import StopAfter, last

DTYPES = {name: Precision(getattr(torch, name), "") for name in ("float32", "bfloat16")}
ROWS = 12
"""Of a batch that 1, 2, 3 and 4 ranks share."""


def make(
    ranks: Comm, width: int = 16, savings: Savings = DEFAULT_SAVINGS, dtype: str = "float32"
) -> TrainStep:
    precision = DTYPES[dtype]
    model = GPT(dataclasses.replace(TINY, n_embd=width))
    model.init_weights(torch.Generator().manual_seed(0))
    root = apply_fsdp(model, precision, ranks) if ranks.world_size > 1 else None
    optimizer = build_adamw(model, betas=(0.9, 0.95), weight_decay=0.1)
    return TrainStep(
        model, optimizer, precision=precision, micro_batch_size=1, grad_clip=1.0,
        kernels=KernelConfig(manual_backward=True), savings=savings, comm=ranks, root=root,
    )  # fmt: skip


@torch.no_grad()
def judge(update: TrainStep, ranks: Comm) -> float:
    update.root_module.eval()
    return float(ranks.all_reduce(update.root_module(*batch(ranks, ROWS)).detach().clone()))


def steps(ranks: Comm, width: int, savings: Savings, dtype: str) -> list:
    """Losses and norms, an evaluation behind each update, and the weights that came of it."""
    update, seen = make(ranks, width, savings, dtype), []
    parameters = list(update.model.parameters())
    for _ in range(5):
        loss, norm = update(*batch(ranks, ROWS), lr=1e-2)
        seen.append([float(loss), float(norm), judge(update, ranks)])
    wholes = [gather_full_tensor(p, ranks) for p in parameters]
    final = [x for w in wholes if w is not None for x in w.flatten().tolist()]
    return [update.backend_name, seen, final]


@pytest.mark.parametrize(
    ("width", "savings", "dtype"),
    [
        (16, DEFAULT_SAVINGS, "float32"),
        (14, DEFAULT_SAVINGS, "float32"),  # which ranks cannot cut evenly
        (14, Savings(activation_checkpointing=True), "bfloat16"),
    ],
)
def test_shards_that_are_put_together_learn_what_one_process_learns(width, savings, dtype) -> None:
    _, seen, final = steps(SINGLE_PROCESS, width, savings, dtype)
    for count in (2, 3):
        for rank, (way, theirs, end) in enumerate(on_ranks(count, steps, width, savings, dtype)):
            assert way == "written out, in shards"
            ours, theirs = torch.tensor(seen), torch.tensor(theirs)
            torch.testing.assert_close(theirs[:, :2], ours[:, :2])
            # One process judges in float32 here, shards in the type of their products.
            close = {"rtol": 1e-3, "atol": 0} if dtype == "bfloat16" else {}
            torch.testing.assert_close(theirs[:, 2], ours[:, 2], **close)
            if not rank:
                torch.testing.assert_close(
                    torch.tensor(end), torch.tensor(final), rtol=1e-5, atol=1e-4
                )


def run(ranks: Comm, values: dict, stop_after: int = 0) -> str:
    """A whole run as a GPU would do it, on a CPU."""
    with mock.patch.object(
        train_step, "kernels_of", lambda *_, **__: KernelConfig(manual_backward=True)
    ):
        trainer = build_trainer(Config(**values), explicit=(), log=lambda _: None, comm=ranks)
    assert trainer.step_fn.backend_name == "written out, in shards"
    if stop_after and ranks.is_main:
        trainer.stop_signal = StopAfter(stop_after)
    return trainer.fit()


def test_a_run_is_judged_sampled_saved_and_gone_on_with_in_any_form(config, tmp_path) -> None:
    config = dataclasses.replace(config, max_steps=9, eval_every=3, save_every=9, sample_every=4)
    on(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "shards"), parallel="fsdp")
    assert set(on_ranks(2, run, vars(other), 4)) == {"interrupted"}
    assert last(other).name == "step-000004"
    on(1, dataclasses.replace(other, parallel="auto"), 2)
    assert set(on_ranks(4, run, vars(other))) == {"finished"}
    assert_same_run(config, other)


def test_a_cut_changes_no_bit_of_what_they_learn(config, tmp_path) -> None:
    config = dataclasses.replace(config, max_steps=7, dropout=0.1, parallel="fsdp")
    on_ranks(2, run, vars(config))
    cut = dataclasses.replace(config, out_dir=str(tmp_path / "cut"))
    on_ranks(2, run, vars(cut), 3)
    on_ranks(2, run, vars(cut))
    assert_same_run(config, cut, bits=True)


def messages(ranks: Comm) -> list:
    """What is sent in which micro-batch of an update; 0 is before the first one."""
    update, sent, now = make(ranks), [], [0]
    learn = update._forward_backward

    def counted(*args: object) -> torch.Tensor:
        now[0] += 1
        return learn(*args)

    update._forward_backward = counted
    for name in ("begin_gather", "begin_sum_to_own", "begin_sum"):
        real = getattr(DistributedComm, name)

        def noted(tensor: torch.Tensor, name: str = name, real=real):
            sent.append((name, now[0]))
            return real(ranks, tensor)

        setattr(ranks, name, noted)
    update(*batch(ranks, ROWS), lr=1e-2)
    return sent


def test_weights_are_sent_once_an_update_and_gradients_in_its_last_micro_batch() -> None:
    matrices = 2 + 4 * TINY.n_layer
    for sent in on_ranks(2, messages):
        kinds = {kind: [when for name, when in sent if name == kind] for kind, _ in sent}
        # The vectors take one message together.
        assert kinds["begin_gather"] == [0] * (1 + matrices)
        last_one = ROWS // 2
        assert kinds["begin_sum_to_own"] == [last_one] * matrices
        assert set(kinds["begin_sum"]) == {last_one}


def broken(ranks: Comm) -> list:
    update = make(ranks)
    update(*batch(ranks, ROWS), lr=1e-2)
    every = [p for group in update.optimizer.param_groups for p in group["params"]]
    moments = [update.optimizer.state[p]["exp_avg"] for p in every]
    whole_size = sum(p.numel() for p in every)
    shares = [
        sum(local_tensor(t).numel() for t in group) / whole_size for group in (every, moments)
    ]
    before = [local_tensor(p).clone() for p in every]
    learn = update._forward_backward
    update._forward_backward = lambda x, y, scale: learn(
        x, y, float("nan") if ranks.rank == 1 else scale
    )
    _, norm = update(*batch(ranks, ROWS), lr=1e-2)
    same = all(torch.equal(local_tensor(p), b) for p, b in zip(every, before, strict=True))
    return [*shares, same, str(float(norm))]


def test_each_rank_keeps_its_piece_and_no_number_on_one_stops_all() -> None:
    for weights, moments, same, norm in on_ranks(2, broken):
        assert weights == moments == 0.5
        assert (same, norm) == (True, "nan")


class Two(Comm):
    world_size = 2


def test_what_computes_is_whole_only_where_there_is_room_for_it(monkeypatch) -> None:
    config = dataclasses.replace(Config(), vocab_size=50304, n_layer=48, n_embd=1600, n_head=25)
    gpu = torch.device("cuda", 0)
    for free, expected in ((80e9, True), (40e9, True), (24e9, False)):
        monkeypatch.setattr(memory_fit, "usable_memory", lambda device, free=free: int(free))
        assert fits_zero1(config, gpu, (), Two()) is expected
    monkeypatch.setattr(memory_fit, "usable_memory", lambda device: int(40e9))
    large = dataclasses.replace(config, batch_size=32)
    assert not fits_zero1(large, gpu, ("batch_size",), Two())


def rehearsing(ranks: Comm) -> list:
    update, seen = make(ranks), []
    for _ in range(3):
        seen.append([float(x) for x in update(*batch(ranks, ROWS), lr=1e-2)])
        update.dry_run(1, 16)
    return seen


def test_a_rehearsal_between_updates_leaves_no_trace() -> None:
    expected = rehearsing(SINGLE_PROCESS)
    for seen in on_ranks(2, rehearsing):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
