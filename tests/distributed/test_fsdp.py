"""A model in shards learns what a whole one learns, and its checkpoints are the ordinary ones."""

import dataclasses

import pytest
import torch

from gptforge import load
from gptforge.builders import build_trainer
from gptforge.builders import parallel as building
from gptforge.builders.parallel import use_fsdp
from gptforge.checkpoint.store import read_tensors
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError
from tests.distributed.runs import assert_same_run, on
from tests.distributed.spawn import on_ranks
from tests.train.runs import events, last

BF16 = Precision(torch.bfloat16, "")


@pytest.fixture
def config(config: Config) -> Config:
    """Short: a run in shards of a tiny model is all waiting for messages."""
    return dataclasses.replace(
        config, max_steps=9, eval_every=9, save_every=9, sample_every=0, warmup_steps=2
    )


def sharded(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, parallel="fsdp", **changes)


def test_shards_learn_what_a_whole_model_learns(config, tmp_path) -> None:
    on(1, config)
    several = sharded(config, out_dir=str(tmp_path / "shards"))
    assert on(4, several) == {"finished"}
    assert_same_run(config, several)
    alone, theirs = load(config.out_dir), load(several.out_dir)
    ids = alone.encode("What light")
    torch.testing.assert_close(alone.logits(ids), theirs.logits(ids), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_shards_is_gone_on_with_by_whole_models_and_back(config, tmp_path) -> None:
    """With widths that 3 ranks cannot cut evenly."""
    batch = {"batch_size": 6, "gradient_accumulation_steps": 2}
    config = dataclasses.replace(config, n_embd=28, **batch)
    on(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "changing"))
    on(3, sharded(other), 3)
    assert last(other).name == "step-000003"
    on(2, other, 2)
    on(2, sharded(other), 2)
    assert on(1, other) == {"finished"}
    assert_same_run(config, other)


def test_a_cut_or_recomputing_changes_no_bit_of_what_shards_learn(config, tmp_path) -> None:
    config = sharded(config, dtype="bfloat16", dropout=0.1)
    on(2, config)
    cut = dataclasses.replace(config, out_dir=str(tmp_path / "cut"))
    on(2, cut, 5)
    on(2, dataclasses.replace(cut, activation_checkpointing=True))
    assert_same_run(config, cut, bits=True)


def test_narrow_shards_learn_nearly_what_a_whole_narrow_model_learns(config, tmp_path) -> None:
    config = dataclasses.replace(config, dtype="bfloat16", max_lr=1e-3)
    on(1, config)
    other = sharded(config, out_dir=str(tmp_path / "shards"))
    on(2, other)
    losses = [[e["loss"] for e in events(c, "train")] for c in (config, other)]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert {t.dtype for t in read_tensors(last(other), "model.safetensors").values()} == {
        torch.float32
    }


def pieces(ranks: Comm, values: dict) -> list:
    """Shares of weights and moments that lie on this rank, and what a bad step changes."""
    trainer = build_trainer(Config(**values), explicit=(), log=lambda _: None, comm=ranks)
    step, model = trainer.step_fn, trainer.step_fn.model
    inputs, targets = trainer.dataloader.next_batch()
    step(inputs, targets, lr=1e-3)
    every = list(model.parameters())
    moments = [step.optimizer.state[p]["exp_avg"] for p in every]
    whole = sum(p.numel() for p in every)
    shares = [sum(t.to_local().numel() for t in group) / whole for group in (every, moments)]
    before = [p.to_local().clone() for p in every]
    learn = step._forward_backward

    def no_number(x, y, scale):
        return learn(x, y, float("nan") if ranks.rank == 1 else scale)

    step._forward_backward = no_number
    _, norm = step(inputs, targets, lr=1e-3)
    same = all(torch.equal(p.to_local(), b) for p, b in zip(every, before, strict=True))
    trainer.lock.release()
    return [*shares, same, str(float(norm))]


def test_each_rank_holds_its_piece_and_no_number_on_one_stops_all(config) -> None:
    for weights, moments, same, norm in on_ranks(4, pieces, vars(sharded(config))):
        assert weights == moments == pytest.approx(0.25, abs=0.02)
        assert (same, norm) == (True, "nan")


class Two(Comm):
    world_size = 2


def test_a_model_that_does_not_fit_is_sharded_without_being_asked(monkeypatch) -> None:
    said: list[str] = []
    config = dataclasses.replace(Config(), vocab_size=50304, n_layer=48, n_embd=1600, n_head=25)
    gpu = torch.device("cuda", 0)
    for free, expected in ((80e9, False), (24e9, True)):
        monkeypatch.setattr(building, "usable_memory", lambda device, free=free: int(free))
        assert use_fsdp(config, gpu, BF16, Two(), said.append) is expected
    assert "ddp" in said[0] and "fsdp" in said[1] and "a whole one takes" in said[1]
    whole = dataclasses.replace(config, parallel="ddp")
    assert not use_fsdp(whole, gpu, BF16, Two(), said.append)


def test_shards_that_cannot_work_are_refused() -> None:
    config = dataclasses.replace(Config(), parallel="fsdp")
    with pytest.raises(UserError, match="--parallel fsdp shares a model among several ranks"):
        use_fsdp(config, torch.device("cpu"), BF16, SINGLE_PROCESS, print)
    half = Precision(torch.float16, "")
    with pytest.raises(UserError, match="--dtype float16 does not go with --parallel fsdp"):
        use_fsdp(config, torch.device("cpu"), half, Two(), print)
    muon = dataclasses.replace(config, optimizer="muon")
    with pytest.raises(UserError, match="--optimizer muon needs whole matrices"):
        use_fsdp(muon, torch.device("cpu"), BF16, Two(), print)
