"""Evaluation, logits, sampling, tasks and exports give a token the same probability."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from gptforge import load
from gptforge.builders.export_model import export_hf
from gptforge.device import Precision
from gptforge.evaluate.tasks import Example, score_choices
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.tokenizers.char import CharTokenizer
from tests.training.conftest import config as config
from tests.training.runs import build, events, last

FLOAT32 = Precision(torch.float32, "")
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"
TEXT = "to be or not to be that is the question\n"


@pytest.fixture
def lm(tiny_model) -> LanguageModel:
    """28 characters, and an embedding of 64 rows whose padding rows are likely."""
    with torch.no_grad():
        tiny_model.transformer["wte"].weight[len(ALPHABET) :] *= 40
    return LanguageModel(tiny_model, CharTokenizer(ALPHABET))


def expected(lm: LanguageModel, ids: list[int]) -> list[float]:
    """Log probability of each id but the first, among the ids of the tokenizer."""
    with torch.no_grad():
        logits = lm.model.eval()(torch.tensor([ids[:-1]]))[0, :, : len(ALPHABET)]
    logprobs = logits.double().log_softmax(-1)
    return [float(logprobs[i, target]) for i, target in enumerate(ids[1:])]


def test_padding_rows_do_not_count_in_the_validation_loss(lm) -> None:
    ids = lm.encode(TEXT[:17])
    evaluator = ValEvaluator(
        np.array(ids, np.uint16), np.ones(len(ALPHABET), np.int64), context_length=16, batch_size=1
    )
    score = evaluator.evaluate(lm.model, FLOAT32)
    assert score.loss == pytest.approx(-np.mean(expected(lm, ids)), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(score.loss / np.log(2))
    # The training loss is over all rows, and much higher here.
    with torch.no_grad():
        loss = lm.model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])) / 16
    assert float(loss) > score.loss + 0.1


def test_logits_leave_padding_rows_out(lm) -> None:
    ids = lm.encode(TEXT[:16])
    logits = lm.logits(ids[:-1])
    assert logits.shape == (15, len(ALPHABET))
    loss = F.cross_entropy(logits, torch.tensor(ids[1:]))
    assert float(loss) == pytest.approx(-np.mean(expected(lm, ids)), rel=1e-5)


def test_sampled_tokens_have_the_logprobs_of_the_logits(lm) -> None:
    tokens = list(lm.stream_tokens("to be", 8, SamplingParams(temperature=1.0), seed=3))
    ids = lm.encode("to be") + [token.id for token in tokens]
    logprobs = [token.logprob for token in tokens]
    assert logprobs == pytest.approx(expected(lm, ids)[4:], abs=1e-4)


def test_tasks_score_the_same_probability(lm) -> None:
    [[result]] = score_choices(lm, [Example("to be", (" or",))], FLOAT32)
    logprobs = expected(lm, lm.encode("to be or"))
    assert result.loglikelihood == pytest.approx(sum(logprobs[-3:]), abs=1e-4)


def test_run_has_the_same_loss_in_training_and_in_eval(config, program) -> None:
    config = dataclasses.replace(config, dropout=0.0, eval_tokens=0)
    build(config).fit()
    val_tokens = val_tokens_of(config)
    lm = load(config.out_dir + "/checkpoints/last", device="cpu")
    assert lm.tokenizer.vocab_size < lm.model.config.vocab_size
    losses, length = [], config.context_length
    for start in range(0, len(val_tokens) - 1, length):
        part = val_tokens[start : start + length + 1].tolist()
        logprobs = lm.logits(part[:-1]).log_softmax(-1)
        losses += [-float(logprobs[i, target]) for i, target in enumerate(part[1:])]
    in_training = events(config, "eval")[-1]["val_loss"]
    assert in_training == pytest.approx(np.mean(losses), rel=1e-5)
    done = program("eval", last(config), "--json", "--device", "cpu")
    assert json.loads(done.out)["loss"] == pytest.approx(in_training, rel=1e-5)


def val_tokens_of(config) -> np.ndarray:
    longer = dataclasses.replace(config, max_steps=config.max_steps + 1)
    trainer = build(longer)
    trainer.lock.release()
    assert trainer.val_evaluator is not None
    return np.asarray(trainer.val_evaluator._tokens[:])


def test_export_has_the_same_probabilities(config, tmp_path) -> None:
    build(config).fit()
    export_hf(config.out_dir, tmp_path / "out")
    exported = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", local_files_only=True)
    model = load(config.out_dir, device="cpu")
    ids = model.encode("What light is 7 in")
    with torch.no_grad():
        logprobs = exported.eval()(torch.tensor([ids])).logits[0, :, : model.tokenizer.vocab_size]
    torch.testing.assert_close(
        model.logits(ids).softmax(-1), logprobs.softmax(-1), rtol=1e-4, atol=1e-6
    )


def test_training_loss_counts_all_rows(config) -> None:
    # The padding rows learn to be unlikely.
    trainer = build(dataclasses.replace(config, dropout=0.0))
    inputs, targets = trainer.dataloader.next_batch()
    with torch.no_grad():
        logits = trainer.step_fn.model(inputs)
    loss, _ = trainer.step_fn(inputs, targets, lr=0.0)
    trainer.lock.release()
    assert logits.size(-1) == 64
    expected_loss = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORE_INDEX
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
