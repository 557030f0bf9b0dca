"""Training on each kind of input gives the same losses, and resumes."""

import dataclasses
import json
import random
from pathlib import Path

import pytest

from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.run_evaluation import evaluate_run
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.errors import UserError
from tests.training.runs import StopAfter, build, events


def finish(config) -> list[float]:
    assert build(config).fit() == "finished"
    return [event["loss"] for event in events(config, "train")]


def jsonl(path: Path, count: int) -> Path:
    rng = random.Random(1)
    words = ["what", "light", "through", "yonder", "window", "breaks", "juliet", "sun", "east"]
    texts = [" ".join(rng.choice(words) for _ in range(40)) for _ in range(count)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_text_and_its_shards_give_the_same_losses(config, tmp_path) -> None:
    config = dataclasses.replace(config, val_fraction=0.2)
    from_text = finish(config)
    prepare(
        tmp_path / "shards",
        PrepareRequest((config.input,), tokenizer="char", val_fraction=0.2),
    )
    shards = dataclasses.replace(
        config, input=str(tmp_path / "shards"), out_dir=str(tmp_path / "b"), tokenizer="gpt2"
    )
    # The shards have their tokenizer with them; none was set explicitly.
    assert finish(shards) == from_text
    assert [e["val_loss"] for e in events(shards, "eval")] == [
        e["val_loss"] for e in events(config, "eval")
    ]


@pytest.mark.parametrize("count", [5, 130])
def test_run_on_documents_resumes(config, tmp_path, count) -> None:
    config = dataclasses.replace(config, input=str(jsonl(tmp_path / "d.jsonl", count)))
    straight = finish(dataclasses.replace(config, out_dir=str(tmp_path / "straight")))
    trainer = build(config)
    trainer.stop_signal = StopAfter(7)
    assert trainer.fit() == "interrupted"
    assert finish(config) == straight
    score = evaluate_run(config.out_dir, device="cpu")
    last = events(config, "eval")
    assert score.loss == pytest.approx(min(event["val_loss"] for event in last), rel=1e-5)


def test_learned_bpe_trains_resumes_and_evaluates(config, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tokenizers")
    config = dataclasses.replace(config, tokenizer="bpe", eval_tokens=0)
    straight = finish(dataclasses.replace(config, out_dir=str(tmp_path / "straight")))
    trainer = build(config)
    assert trainer.tokenizer.name == "bpe"
    assert trainer.config.vocab_size % 64 == 0
    trainer.stop_signal = StopAfter(7)
    assert trainer.fit() == "interrupted"
    # Another machine, whose package learns other merges: the run has its own.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("gptforge.tokenizers.hf_bpe.train_bpe", None)
    assert finish(config) == straight
    score = evaluate_run(config.out_dir, device="cpu")
    best = min(events(config, "eval"), key=lambda event: event["val_loss"])
    assert score.nats_per_char == pytest.approx(best["val_nats_per_char"], rel=1e-5)


def test_vocab_size_of_bpe_is_its_number_of_ids(config) -> None:
    pytest.importorskip("tokenizers")
    trainer = build(dataclasses.replace(config, tokenizer="bpe", vocab_size=270))
    assert trainer.config.vocab_size == trainer.tokenizer.vocab_size == 270


def test_resume_with_other_documents_is_refused(config, tmp_path) -> None:
    path = jsonl(tmp_path / "d.jsonl", 130)
    config = dataclasses.replace(config, input=str(path))
    trainer = build(config)
    trainer.stop_signal = StopAfter(7)
    trainer.fit()
    path.write_text(path.read_text().replace("juliet", "julia"))
    with pytest.raises(UserError, match="input: not the text that"):
        build(config)


def test_tokenizer_other_than_the_shards_is_refused(config, tmp_path) -> None:
    prepare(tmp_path / "shards", PrepareRequest((config.input,), tokenizer="byte"))
    config = dataclasses.replace(config, input=str(tmp_path / "shards"))
    with pytest.raises(UserError, match="prepared with the tokenizer byte"):
        build_trainer(config, explicit=["tokenizer"])
    assert finish(config)


def test_invalid_token_id_names_the_shard(config, tmp_path) -> None:
    import numpy as np

    np.full(3000, 9999, "<u2").tofile(tmp_path / "train.bin")
    config = dataclasses.replace(
        config, input=str(tmp_path / "train.bin"), raw_bin=True, tokenizer="byte"
    )
    with pytest.raises(UserError, match=r"train.bin: token id 9999 is outside"):
        build_trainer(config, explicit=["tokenizer"])


@pytest.mark.parametrize("is_prepared", [True, False])
def test_hint_to_hold_out_validation_data(config, tmp_path, messages, is_prepared) -> None:
    config = dataclasses.replace(config, val_fraction=0.0)
    if is_prepared:
        prepare(
            tmp_path / "shards", PrepareRequest((config.input,), tokenizer="char", val_fraction=0.0)
        )
        config = dataclasses.replace(config, input=str(tmp_path / "shards"))
    assert finish(config)
    hint = "prepare the text again with" if is_prepared else "use"
    assert f"To measure that, {hint} --val_fraction 0.1." in messages[-1]


def test_shards_with_too_little_validation_data(config, tmp_path) -> None:
    prepare(
        tmp_path / "shards", PrepareRequest((config.input,), tokenizer="char", val_fraction=0.0001)
    )
    config = dataclasses.replace(config, input=str(tmp_path / "shards"))
    with pytest.raises(UserError, match="prepare the text again with a larger --val_fraction"):
        build(config)


def test_hint_for_a_vocab_size_too_small_works(program, play) -> None:
    options = ("--preset=debug", "--device=cpu", "--max_steps=1", "--input", play)
    assert program(*options, "--out_dir", "a").code == 0
    flags = (*options, "--config", "a/config.toml", "--out_dir", "b", "--tokenizer", "gpt2")
    refused = program(*flags)
    assert refused.code == 2
    assert "give 50257 or more, or 0 for as many as it needs" in refused.err
    assert program(*flags, "--vocab_size", 0).code == 0
