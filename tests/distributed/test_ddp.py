"""Several processes learn what one learns: the same windows, losses and weights, to rounding."""

import dataclasses

import pytest
import torch

from gptforge.builders import build_trainer
from gptforge.builders.parallel import check_global_batch
from gptforge.checkpoint.store import read_tensors
from gptforge.config import Config
from gptforge.data.dataloader import DataLoader
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError
from gptforge.evaluate.val_loss import PartialValLoss, ValEvaluator
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.train.parallel import grad_reducer
from gptforge.train.train_step import TrainStep
from tests.conftest import TINY
from tests.distributed.runs import assert_same_run, on
from tests.distributed.spawn import on_ranks
from tests.train.runs import events, last

FLOAT32 = Precision(torch.float32, "")


def test_two_and_four_ranks_learn_what_one_process_learns(config, tmp_path) -> None:
    on(1, config)
    for count in (2, 4):
        several = dataclasses.replace(config, out_dir=str(tmp_path / f"run-{count}"))
        assert on(count, several) == {"finished"}
        assert [event["step"] for event in events(several, "train")] == list(range(20))
        assert_same_run(config, several)


def test_a_run_goes_on_with_another_number_of_ranks(config, tmp_path) -> None:
    on(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "changing"))
    assert on(2, other, 7) == {"interrupted"}
    assert last(other).name == "step-000007"
    assert on(4, other, 5) == {"interrupted"}
    assert on(1, other) == {"finished"}
    assert_same_run(config, other)


def test_a_run_with_dropout_cut_in_two_is_the_run_in_one_on_as_many_ranks(config, tmp_path) -> None:
    """Every rank throws its own dice, and goes on with them."""
    config = dataclasses.replace(config, dropout=0.2)
    on(2, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "cut"))
    on(2, other, 7)
    on(2, other)
    assert_same_run(config, other, bits=True)
    dice = read_tensors(last(config), "rng.safetensors")
    assert not torch.equal(dice["cpu"], dice["cpu.1"])


def test_a_wish_to_stop_on_one_rank_stops_all_behind_the_same_step(config) -> None:
    assert on(2, config, 4, 1) == {"interrupted"}
    assert last(config).name == "step-000004"


def batch(ranks: Comm, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of a batch that is the same for any number of ranks."""
    tokens = torch.randint(0, 64, (rows, 17), generator=torch.Generator().manual_seed(5))
    each = rows // ranks.world_size
    tokens = tokens[ranks.rank * each : (ranks.rank + 1) * each]
    return tokens[:, :-1], tokens[:, 1:]


def make(ranks: Comm, *, by_hand: bool, micro_batch: int = 1) -> TrainStep:
    grad_reducer.BUCKET_BYTES = 4096  # several messages even for a tiny model
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    return TrainStep(
        model,
        build_adamw(model, betas=(0.9, 0.95), weight_decay=0.1),
        precision=FLOAT32,
        micro_batch_size=micro_batch,
        grad_clip=1.0,
        kernels=KernelConfig(manual_backward=True) if by_hand else DEFAULT_KERNELS,
        halve_on_oom=True,
        log=lambda text: None,
        comm=ranks,
    )


def weights(step: TrainStep) -> list[float]:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()]).tolist()


def steps(ranks: Comm, by_hand: bool) -> list:
    step = make(ranks, by_hand=by_hand)
    seen = [[float(x) for x in step(*batch(ranks), lr=1e-2)] for _ in range(5)]
    return [seen, weights(step)]


@pytest.mark.parametrize("by_hand", [True, False], ids=["written out", "autograd"])
def test_each_way_of_an_update_adds_up_over_the_ranks(by_hand) -> None:
    seen, final = steps(SINGLE_PROCESS, by_hand)
    for count in (2, 4):
        for theirs, end in on_ranks(count, steps, by_hand):
            torch.testing.assert_close(torch.tensor(theirs), torch.tensor(seen))
            torch.testing.assert_close(torch.tensor(end), torch.tensor(final), rtol=1e-5, atol=1e-4)


def sending(ranks: Comm, by_hand: bool) -> list:
    """Which micro-batch each message was sent in, and how many gradients were made before it."""
    step = make(ranks, by_hand=by_hand)
    micro_batch, made, sent = 0, 0, []
    begin, learn, sync = ranks.all_reduce_async, step._forward_backward, step.reducer

    def count_micro_batches(*args):
        nonlocal micro_batch
        micro_batch += 1
        return learn(*args)

    def note_made(groups: int) -> None:
        nonlocal made
        made = groups
        type(sync).grads_ready(sync, groups)

    def note_sent(tensor):
        sent.append([micro_batch, made, tensor.numel()])
        return begin(tensor)

    step._forward_backward, ranks.all_reduce_async = count_micro_batches, note_sent
    if by_hand:
        step.backend.on_grads_ready = note_made
    else:
        step._gradients_in_a_row.on_grads_ready = note_made
    step(*batch(ranks), lr=1e-2)
    return [sent, sum(p.numel() for p in step.model.parameters())]


@pytest.mark.parametrize("by_hand", [True, False], ids=["written out", "autograd"])
def test_gradients_set_out_while_others_are_made_in_the_last_micro_batch_only(by_hand) -> None:
    for sent, numbers in on_ranks(2, sending, by_hand):
        assert {micro_batch for micro_batch, _, _ in sent} == {4}
        assert len({made for _, made, _ in sent}) >= 2
        assert sum(size for _, _, size in sent) >= numbers


def broken(ranks: Comm, by_hand: bool) -> list:
    """One good update, and one in which rank 1 meets what is no number."""
    step = make(ranks, by_hand=by_hand)
    step(*batch(ranks), lr=1e-2)
    before = weights(step)
    learn = step._forward_backward

    def no_number(x, y, scale):
        return learn(x, y, float("nan") if ranks.rank == 1 else scale)

    step._forward_backward = no_number
    loss, norm = step(*batch(ranks), lr=1e-2)
    return [weights(step) == before, str(float(loss)), str(float(norm))]


@pytest.mark.parametrize("by_hand", [True, False], ids=["written out", "autograd"])
def test_no_number_on_one_rank_leaves_the_update_out_on_all(by_hand) -> None:
    one, two = on_ranks(2, broken, by_hand)
    assert one == two
    assert one[0] is True
    assert one[2] == "nan"


def short_of_memory(ranks: Comm, by_hand: bool, late: bool) -> list:
    """Rank 1 runs out of memory in the second update, before or after it sent anything."""
    step = make(ranks, by_hand=by_hand, micro_batch=2)
    step(*batch(ranks), lr=1e-2)
    before = weights(step)
    learn, calls = step._forward_backward, 0

    def fail_once(*args):
        nonlocal calls
        calls += 1
        if ranks.rank == 1 and calls == 2 and not late:
            raise torch.OutOfMemoryError("no memory")
        loss = learn(*args)
        if ranks.rank == 1 and calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return loss

    step._forward_backward = fail_once
    loss, _ = step(*batch(ranks), lr=1e-2)
    second = weights(step)
    step(*batch(ranks), lr=1e-2)
    return [second == before, float(loss), second, weights(step), step.micro_batch_size]


@pytest.mark.parametrize("by_hand", [True, False], ids=["written out", "autograd"])
def test_memory_that_runs_out_on_one_rank_does_not_change_what_is_learned(by_hand) -> None:
    seen, _ = steps(SINGLE_PROCESS, by_hand)
    one, two = on_ranks(2, short_of_memory, by_hand, False)
    assert one[:4] == two[:4]
    assert one[0] is False
    assert one[1] == pytest.approx(seen[1][0], rel=1e-5)
    assert (one[4], two[4]) == (2, 1)


@pytest.mark.parametrize("by_hand", [True, False], ids=["written out", "autograd"])
def test_memory_that_runs_out_too_late_leaves_the_update_out_on_all(by_hand) -> None:
    one, two = on_ranks(2, short_of_memory, by_hand, True)
    assert one[0] is two[0] is True
    assert one[2:4] == two[2:4]
    assert two[4] == 1


def judge(ranks: Comm) -> list:
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    tokens = torch.arange(16 * 11 + 5).numpy() % 60
    held_out = ValEvaluator(tokens, tokens * 0 + 1, context_length=16, batch_size=3)
    score = held_out.evaluate(model, FLOAT32, ranks)
    return [score.loss, score.bits_per_byte, score.num_tokens, score.num_bytes]


def test_an_evaluation_is_spread_over_the_ranks_and_scores_the_same() -> None:
    alone = judge(SINGLE_PROCESS)
    for count in (2, 4):
        for score in on_ranks(count, judge):
            assert score == pytest.approx(alone, rel=1e-6)


def different(ranks: Comm) -> str:
    try:
        ranks.assert_same({"text": "this" if ranks.rank != 2 else "that"})
    except UserError as error:
        return str(error)
    return ""


def test_a_rank_with_another_text_is_named() -> None:
    said = on_ranks(3, different)
    assert "rank 2 on " in said[0]
    assert "has another text than rank 0: that, not this" in said[0]
    assert said[1:] == ["", ""]


def test_what_a_rank_was_started_with_is_compared_not_what_rank_0_made_of_it(config) -> None:
    noted: dict[str, str] = {}

    class Second(Comm):
        def broadcast_from_rank0(self, compute):
            said = compute()
            is_config = isinstance(said, dict) and "max_lr" in said
            return said | {"max_lr": 1e-3} if is_config else said

        def assert_same(self, values):
            noted.update(values)

    config = dataclasses.replace(config, max_lr=0.5)
    trainer = build_trainer(config, explicit=(), log=lambda _: None, comm=Second())
    assert trainer is not None and trainer.config.max_lr == 1e-3
    trainer.lock.release()
    assert noted["--max_lr"] == "0.5"


def give_up(ranks: Comm) -> list:
    """Rank 1 gives up in its third round; in which round each hears of it."""
    model = GPT(TINY).init_weights(torch.Generator().manual_seed(0))
    held_out = ValEvaluator(
        torch.zeros(16 * 40).numpy().astype("uint16"), torch.ones(64).numpy().astype("int64"),
        context_length=16, batch_size=1,
    )  # fmt: skip
    rounds: list[int] = []

    def gives_up() -> bool:
        rounds.append(1)
        return ranks.rank == 1 and len(rounds) >= 3

    score = held_out.evaluate_until(gives_up, model, FLOAT32, ranks)
    return [isinstance(score, PartialValLoss), len(rounds)]


def test_one_rank_that_gives_up_ends_an_evaluation_on_all_in_the_same_round() -> None:
    assert on_ranks(2, give_up) == [[True, 5], [True, 5]]


def test_ranks_see_the_rows_that_one_process_would_see() -> None:
    tokens = torch.arange(400).numpy().astype("uint16")

    def rows(rank: int, size: int) -> torch.Tensor:
        loader = DataLoader(
            tokens, context_length=7, global_batch_size=8, seed=1, shuffle=True,
            device=torch.device("cpu"), rank=rank, world_size=size,
        )  # fmt: skip
        return torch.stack([loader.next_batch()[0] for _ in range(9)], 1)

    for size in (2, 4):
        assert torch.equal(torch.cat([rows(rank, size) for rank in range(size)]), rows(0, 1))


class Three(Comm):
    world_size = 3


def test_a_global_batch_that_cannot_be_shared_says_what_could_be() -> None:
    config = dataclasses.replace(Config(), batch_size=8, gradient_accumulation_steps=5)
    with pytest.raises(UserError, match="40 windows, which 3 ranks") as caught:
        check_global_batch(config, Three())
    assert "use 2, 4, 5, 8, 10, 20, 40 ranks, or, unless a run" in str(caught.value)
    assert "--gradient_accumulation_steps 6" in str(caught.value)
    check_global_batch(dataclasses.replace(config, gradient_accumulation_steps=6), Three())


@pytest.mark.parametrize(
    ("device", "env", "says"),
    [
        ("cuda:1", {}, "--device cuda:1: torchrun gives each rank its own"),
        ("mps", {}, "--device mps: torchrun gives each rank its own"),
        ("cpu", {"MASTER_PORT": None}, "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        ("cpu", {"GPTFORGE_SILENCE": "long"}, "GPTFORGE_SILENCE=long: give seconds, such as 120"),
    ],
)
def test_a_launch_that_does_not_fit_together_is_refused(device, env, says) -> None:
    from gptforge.distributed import init_distributed

    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    whole = dict.fromkeys(names, "0") | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    whole |= {"MASTER_PORT": "29500"} | env
    with pytest.raises(UserError, match=says):
        init_distributed(
            device, env={name: value for name, value in whole.items() if value is not None}
        )


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    from gptforge.distributed.init import _local_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _local_device("auto", 1, local_size=2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="4 ranks were started here and torch finds 2 CUDA GPUs"):
        _local_device("auto", 3, local_size=4)
