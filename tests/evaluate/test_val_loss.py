"""Validation loss against a loop over single tokens, interrupted and resumed."""

import math

import numpy as np
import pytest
import torch

from gptforge.device import Precision
from gptforge.evaluate.val_loss import ValEvaluator

FLOAT32 = Precision(torch.float32, "")


def losses_by_token(model, ids, length) -> list[float]:
    losses = []
    for start in range(0, len(ids) - 1, length):
        part = torch.tensor(ids[start : start + length + 1])
        scores = model(part[None, :-1])[0].log_softmax(-1)
        losses += [-float(scores[t, part[t + 1]]) for t in range(len(part) - 1)]
    return losses


@pytest.mark.parametrize("n", [2, 5, 16, 17, 18, 33, 100])
def test_every_token_but_the_first_is_predicted_once(tiny_model, n) -> None:
    ids = np.random.default_rng(n).integers(0, 64, n).astype(np.uint16)
    lengths = np.arange(64) % 4 + 1
    chars = np.arange(64) % 3
    evaluator = ValEvaluator(ids, lengths, char_lengths=chars, context_length=16, batch_size=3)
    loss = evaluator.evaluate(tiny_model, FLOAT32)
    with torch.no_grad():
        losses = losses_by_token(tiny_model.eval(), ids.tolist(), 16)
    assert loss.num_tokens == n - 1 == len(losses)
    assert loss.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert loss.num_bytes == lengths[ids[1:]].sum()
    assert loss.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / loss.num_bytes, rel=1e-5)
    assert loss.num_chars == chars[ids[1:]].sum()
    assert loss.nats_per_char == pytest.approx(sum(losses) / max(1, loss.num_chars), rel=1e-5)
    assert evaluator.fraction == 1.0


def test_batch_size_does_not_matter(tiny_model) -> None:
    ids = np.random.default_rng(0).integers(0, 64, 200).astype(np.uint16)
    losses = [
        ValEvaluator(ids, np.ones(64, np.int64), context_length=16, batch_size=size)
        .evaluate(tiny_model, FLOAT32)
        .loss
        for size in (1, 4, 100)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_max_tokens_reads_sequences_spread_over_the_text(tiny_model) -> None:
    ids = np.zeros(1601, np.uint16)
    evaluator = ValEvaluator(
        ids, np.ones(64, np.int64), context_length=16, batch_size=8, max_tokens=160
    )
    assert evaluator.evaluate(tiny_model, FLOAT32).num_tokens == evaluator.num_tokens == 160
    assert evaluator.fraction == 0.1
    assert np.diff(evaluator._sequence_indices).tolist() == [10] * 9


def test_stopped_evaluation_resumes_with_the_same_loss(tiny_model) -> None:
    tiny_model.train()
    ids = np.random.default_rng(1).integers(0, 64, 16 * 10).astype(np.uint16)
    evaluator = ValEvaluator(ids, np.arange(64) % 3 + 1, context_length=16, batch_size=2)
    full = evaluator.evaluate(tiny_model, FLOAT32)
    partial = None
    for sessions in range(1, 6):
        partial = evaluator.evaluate(tiny_model, FLOAT32, should_stop=lambda: True, partial=partial)
        assert tiny_model.training
        if partial.is_complete:
            break
        assert partial.sequences_done == 2 * sessions
    # Stopped after each batch but the last.
    assert (partial, sessions) == (full, 5)


def test_sums_of_another_evaluation_are_ignored(tiny_model) -> None:
    ids = np.random.default_rng(1).integers(0, 64, 16 * 10).astype(np.uint16)
    lengths = np.ones(64, np.int64)
    evaluator = ValEvaluator(ids, lengths, context_length=16, batch_size=2)
    partial = evaluator.evaluate(tiny_model, FLOAT32, should_stop=lambda: True)
    assert not partial.is_complete
    fewer = ValEvaluator(ids, lengths, context_length=16, batch_size=2, max_tokens=80)
    loss = fewer.evaluate(tiny_model, FLOAT32, partial=partial)
    assert loss == fewer.evaluate(tiny_model, FLOAT32)


def test_evaluation_changes_no_state(tiny_model) -> None:
    tiny_model.train()
    rng_state = torch.get_rng_state()
    ids = np.zeros(40, np.uint16)
    ValEvaluator(ids, np.ones(64, np.int64), context_length=16, batch_size=2).evaluate(
        tiny_model, FLOAT32
    )
    assert tiny_model.training
    assert torch.equal(rng_state, torch.get_rng_state())
    assert all(p.grad is None for p in tiny_model.parameters())


@pytest.mark.parametrize("max_tokens", [0, 1, 20, 32, 33, 96, 97, 100, 999])
@pytest.mark.parametrize("n", [2, 17, 33, 97, 98, 100])
def test_the_number_of_tokens_is_known_before_an_evaluation(tiny_model, n, max_tokens) -> None:
    ids = np.random.default_rng(n).integers(0, 64, n).astype(np.uint16)
    evaluator = ValEvaluator(
        ids, np.ones(64, np.int64), context_length=16, batch_size=3, max_tokens=max_tokens
    )
    loss = evaluator.evaluate(tiny_model, FLOAT32)
    assert loss.num_tokens == evaluator.num_tokens >= min(max_tokens, n - 1)
    assert (evaluator.fraction == 1) == (loss.num_tokens == n - 1)
