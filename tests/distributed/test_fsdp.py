"""FSDP trains as one process does, and its checkpoints do not differ."""

import dataclasses

import pytest
import torch

from gptforge import load
from gptforge.builders import memory_fit
from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.memory_fit import use_fsdp
from gptforge.checkpoint.format import read_tensors
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError
from tests.distributed.runs import assert_same_run, train
from tests.distributed.spawn import on_ranks
from tests.training.runs import events, last

BF16 = Precision(torch.bfloat16, "")


@pytest.fixture
def config(config: Config) -> Config:
    """Few steps: FSDP of a tiny model mostly waits for messages."""
    return dataclasses.replace(
        config, max_steps=9, eval_every=9, save_every=9, sample_every=0, warmup_steps=2
    )


def fsdp(config: Config, **changes: object) -> Config:
    return dataclasses.replace(config, parallel="fsdp", **changes)


def test_fsdp_trains_as_one_process(config, tmp_path) -> None:
    train(1, config)
    other = fsdp(config, out_dir=str(tmp_path / "fsdp"))
    assert train(4, other) == {"finished"}
    assert_same_run(config, other)
    expected, model = load(config.out_dir), load(other.out_dir)
    ids = expected.encode("What light")
    torch.testing.assert_close(model.logits(ids), expected.logits(ids), rtol=1e-4, atol=1e-4)


def test_checkpoint_resumes_with_and_without_fsdp(config, tmp_path) -> None:
    # Three ranks cannot shard these widths evenly.
    batch = {"batch_size": 6, "gradient_accumulation_steps": 2}
    config = dataclasses.replace(config, n_embd=28, **batch)
    train(1, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "changing"))
    train(3, fsdp(other), 3)
    assert last(other).name == "step-000003"
    train(2, other, 2)
    train(2, fsdp(other), 2)
    assert train(1, other) == {"finished"}
    assert_same_run(config, other)


def test_resume_and_activation_checkpointing_are_bitwise_equal(config, tmp_path) -> None:
    config = fsdp(config, dtype="bfloat16", dropout=0.1, dropout_ramp=0.8)
    train(2, config)
    other = dataclasses.replace(config, out_dir=str(tmp_path / "resumed"))
    train(2, other, 5)
    train(2, dataclasses.replace(other, activation_checkpointing=True))
    assert_same_run(config, other, exactly=True)


def test_bfloat16_fsdp_stays_close_to_one_process(config, tmp_path) -> None:
    config = dataclasses.replace(config, dtype="bfloat16", max_lr=1e-3)
    train(1, config)
    other = fsdp(config, out_dir=str(tmp_path / "fsdp"))
    train(2, other)
    losses = [[e["loss"] for e in events(c, "train")] for c in (config, other)]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    tensors = read_tensors(last(other), "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def nan_on_rank1(comm: Comm, config: dict) -> list:
    """Fractions of weights and moments on this rank, and what a step with NaN changes."""
    trainer = build_trainer(Config(**config), explicit=(), comm=comm)
    step = trainer.step_fn
    inputs, targets = trainer.dataloader.next_batch()
    step(inputs, targets, lr=1e-3)
    parameters = list(step.model.parameters())
    moments = [step.optimizer.state[p]["exp_avg"] for p in parameters]
    total = sum(p.numel() for p in parameters)
    fractions = [
        sum(tensor.to_local().numel() for tensor in group) / total
        for group in (parameters, moments)
    ]
    before = [p.to_local().clone() for p in parameters]
    forward_backward = step.backend.forward_backward
    step.backend.forward_backward = lambda x, y, scale: forward_backward(
        x, y, float("nan") if comm.rank == 1 else scale
    )
    _, norm = step(inputs, targets, lr=1e-3)
    same = all(torch.equal(p.to_local(), b) for p, b in zip(parameters, before, strict=True))
    if trainer.lock is not None:
        trainer.lock.release()
    return [*fractions, same, str(float(norm))]


def test_each_rank_holds_one_shard_and_nan_on_one_skips_the_step_on_all(config) -> None:
    for weights, moments, same, norm in on_ranks(4, nan_on_rank1, vars(fsdp(config))):
        assert weights == moments == pytest.approx(0.25, abs=0.02)
        assert (same, norm) == (True, "nan")


class TwoRanks(Comm):
    world_size = 2


def test_auto_takes_fsdp_for_a_model_that_does_not_fit(monkeypatch, messages) -> None:
    config = dataclasses.replace(Config(), vocab_size=50304, n_layer=48, n_embd=1600, n_head=25)
    gpu = torch.device("cuda", 0)
    for free, expected in ((80e9, False), (24e9, True)):
        monkeypatch.setattr(memory_fit, "usable_memory", lambda device, free=free: int(free))
        assert use_fsdp(config, gpu, BF16, TwoRanks()) is expected
    assert "ddp" in messages[0] and "fsdp" in messages[1]
    ddp = dataclasses.replace(config, parallel="ddp")
    assert not use_fsdp(ddp, gpu, BF16, TwoRanks())


def test_unsupported_fsdp_is_refused() -> None:
    config, cpu = dataclasses.replace(Config(), parallel="fsdp"), torch.device("cpu")
    with pytest.raises(UserError, match="--parallel fsdp"):
        use_fsdp(config, cpu, BF16, SINGLE_PROCESS)
    with pytest.raises(UserError, match="--dtype float16"):
        use_fsdp(config, cpu, Precision(torch.float16, ""), TwoRanks())
    with pytest.raises(UserError, match="--optimizer muon"):
        use_fsdp(dataclasses.replace(config, optimizer="muon"), cpu, BF16, TwoRanks())


def losses_around_evaluations(comm: Comm, config: dict) -> list[float]:
    """Training losses with an evaluation after each step, of which none is saved as the best."""
    trainer = build_trainer(Config(**config), explicit=(), comm=comm)
    trainer.reset_history()
    trainer.state.best_loss = float("-inf")
    losses = []
    for _ in range(12):
        trainer.train_step()
        losses.append(trainer.state.loss)
        trainer.evaluate()
    if trainer.lock is not None:
        trainer.lock.release()
    return losses


def test_training_after_an_evaluation_of_the_average_does_not_use_it(config, tmp_path) -> None:
    config = dataclasses.replace(config, ema=0.9, max_lr=3e-2, max_steps=99)
    expected = losses_around_evaluations(SINGLE_PROCESS, vars(config))
    other = fsdp(config, out_dir=str(tmp_path / "fsdp"))
    for losses in on_ranks(2, losses_around_evaluations, vars(other)):
        assert losses == pytest.approx(expected, abs=1e-4)
