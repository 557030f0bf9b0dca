"""A run ends with the loss that `gptforge eval` prints, and says it everywhere."""

import dataclasses
import json
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptforge.api.run import Run
from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.run_evaluation import evaluate_run
from gptforge.demo.run_data import run_metrics
from gptforge.report import run_report
from gptforge.report.curves import plot_curves
from gptforge.report.format import ValLoss
from gptforge.report.metrics import read_history
from gptforge.training import final_evaluation, signals
from gptforge.training import trainer as trainer_module
from gptforge.training.signals import StopSignal
from gptforge.training.trainer import Trainer
from tests.conftest import play_text
from tests.programs import DEBUG
from tests.training.runs import StopAfter, build, events, last

SUBSET = {"eval_tokens": 128}
LOSS = re.compile(r"held-out loss (.* nats per token, .* over [\d,]+ tokens)")
KEYS = ("final_val_loss", "final_val_bpb", "final_val_nats_per_char", "final_val_tokens")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch) -> None:
    """Drawing takes longer than these runs; one test looks at the figure."""
    monkeypatch.setattr(run_report, "save_curves", lambda *args, **kwargs: None)
    # It may take longer on a busy machine.
    for limit in ("MAX_SECONDS", "MAX_SECONDS_AFTER_STOP"):
        monkeypatch.setattr(final_evaluation, limit, 600.0)


def write_documents(folder: Path) -> Path:
    """A folder of two files with several documents each, some of which are held out."""
    folder.mkdir()
    for name in ("one", "two"):
        rows = [{"text": f"{name} {i}: {play_text()[i * 50 :][:50]}"} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--eval_tokens", "0"),
        ("--eval_tokens", "128"),
        ("--tokenizer", "bpe", "--vocab_size", "300", "--eval_tokens", "64"),
        ("--ema", "0.9", "--eval_tokens", "128"),
        ("--val_fraction", "0.01"),
        ("--input", "documents", "--tokenizer", "byte", "--eval_tokens", "256"),
        (
            "--max_lr",
            "1",
            "--schedule",
            "constant",
            "--eval_tokens",
            "128",
        ),  # the best checkpoint is not the last
        ("--preset", "shakespeare-cpu", "--eval_tokens", "128", "--n_layer", "1", "--n_embd", "32"),
    ],
)
def test_eval_prints_the_same_loss_as_the_end_of_training(program, play, flags) -> None:
    write_documents(Path("documents"))
    train = (*DEBUG, "--input", play, "--out_dir", "run", "--max_steps", 20, "--sample_every", 0)
    done = program(*train, "--save_every", 100, "--eval_every", 4, *flags)
    assert done.code == 0, done.err
    [ended] = LOSS.findall(done.out)
    assert LOSS.findall(program("eval", "run", "--device", "cpu").out) == [ended]
    assert LOSS.findall(Path("run/log.md").read_text()) == [ended]

    score = json.loads(program("eval", "run", "--json", "--device", "cpu").out)
    end = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert end["reason"] == "finished"
    expected = [score[name] for name in ("loss", "bits_per_byte", "nats_per_char", "tokens")]
    assert [end[key] for key in KEYS] == expected
    best = Run("run").best
    assert best is not None and (best.loss, best.step) == (score["loss"], end["best_step"])
    history = read_history(Path("run/metrics.jsonl"))
    title = plot_curves(history, title="t").axes[0].get_title("right")
    assert f"{score['loss']:.4f} nats per token" in title
    assert f"{score['loss']:.4f}" in str(run_metrics(history, [], max_steps=20)["tiles"])


def test_training_does_not_depend_on_the_final_evaluation(config, tmp_path, monkeypatch) -> None:
    config = dataclasses.replace(config, **SUBSET, max_lr=0.05)
    build(config).fit()
    other = dataclasses.replace(config, out_dir=str(tmp_path / "other"))
    monkeypatch.setattr(trainer_module, "evaluate_best", lambda trainer, reason: reason)
    build(other).fit()
    for kind, name in (("train", "loss"), ("eval", "val_loss")):
        assert [e[name] for e in events(config, kind)] == [e[name] for e in events(other, kind)]
    assert not set(KEYS) & events(other, "end")[0].keys()


def make_best(trainer: Trainer, best_step: int) -> None:
    """Let the evaluations of later steps have a higher loss."""
    assert trainer.val_evaluator is not None
    evaluate = trainer.val_evaluator.evaluate

    def evaluate_worse(*args, **kwargs) -> ValLoss:
        score = evaluate(*args, **kwargs)
        more_nats = 1e6 if trainer.state.step > best_step else 0.0
        return dataclasses.replace(score, total_nats=score.total_nats + more_nats)

    trainer.val_evaluator.evaluate = evaluate_worse


@pytest.mark.parametrize(("best_step", "loads"), [(20, 0), (4, 1)])
def test_weights_in_memory_are_not_loaded_again(config, monkeypatch, best_step, loads) -> None:
    loaded = []
    load = final_evaluation.load_model_state_dict
    monkeypatch.setattr(
        final_evaluation,
        "load_model_state_dict",
        lambda *args, **kwargs: loaded.append(kwargs["source"]) or load(*args, **kwargs),
    )
    trainer = build(dataclasses.replace(config, **SUBSET))
    make_best(trainer, best_step)
    trainer.fit()
    assert events(config, "end")[0]["best_step"] == best_step
    assert len(loaded) == loads


def test_a_full_evaluation_of_the_best_checkpoint_is_not_repeated(config, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(final_evaluation, "_evaluate", fail)
    build(config).fit()
    best = min(event["val_loss"] for event in events(config, "eval"))
    assert events(config, "end")[0]["final_val_loss"] == best


def test_a_stopped_run_is_evaluated_after_its_save(config, monkeypatch) -> None:
    config = dataclasses.replace(config, **SUBSET)
    trainer = build(config)
    trainer.stop_signal = StopAfter(9)
    evaluate = final_evaluation._evaluate

    def evaluate_later(*args):
        assert last(config).name == "step-000009"
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(final_evaluation, "_evaluate", evaluate_later)
        assert trainer.fit() == "interrupted"
    assert (
        events(config, "end")[0]["final_val_loss"]
        == evaluate_run(config.out_dir, device="cpu").loss
    )
    # A resumed run drops that end, and has another one.
    assert build(config).fit() == "finished"
    [end] = events(config, "end")
    assert (
        end["step"] == 20
        and end["final_val_loss"] == evaluate_run(config.out_dir, device="cpu").loss
    )


def test_a_run_stopped_before_its_first_evaluation_evaluates_its_last_checkpoint(config) -> None:
    trainer = build(config)
    trainer.stop_signal = StopAfter(2)
    trainer.fit()
    [end] = events(config, "end")
    assert end["best_step"] == 2
    assert end["final_val_loss"] == evaluate_run(config.out_dir, device="cpu").loss


@pytest.mark.parametrize("limit", ["MAX_SECONDS_AFTER_STOP", "MAX_SECONDS"])
def test_an_evaluation_that_takes_too_long_is_left_to_eval(
    config, monkeypatch, messages, limit
) -> None:
    monkeypatch.setattr(final_evaluation, limit, 0.0)
    monkeypatch.setattr(final_evaluation, "MAX_FRACTION", 0.0)
    config = dataclasses.replace(config, **SUBSET)
    trainer = build(config)
    is_stop = limit == "MAX_SECONDS_AFTER_STOP"
    if is_stop:
        trainer.stop_signal = StopAfter(9)
    assert trainer.fit() == ("interrupted" if is_stop else "finished")
    name = "step-000008" if is_stop else "step-000020"
    tokens = evaluate_run(config.out_dir, device="cpu").num_tokens
    line = (
        f"{name} was not evaluated on all {tokens:,} held-out tokens: python gpt.py eval "
        f"{config.out_dir} does that, in about "
    )
    assert any(message.startswith(line) for message in messages)
    assert line in (Path(config.out_dir) / "log.md").read_text()
    assert "final_val_loss" not in events(config, "end")[0]
    assert any("bits per byte, over 128 tokens, at step" in line for line in messages)


def test_a_signal_in_the_final_evaluation_leaves_it_to_the_resumed_run(config, monkeypatch) -> None:
    config = dataclasses.replace(config, **SUBSET)
    evaluate = final_evaluation._evaluate

    def evaluate_with_signal(*args):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(final_evaluation, "_evaluate", evaluate_with_signal)
        assert build(config).fit() == "terminated"
    saved = sorted((Path(config.out_dir) / "checkpoints").glob("step-*/model.safetensors"))
    assert last(config).name == "step-000020"
    [end] = events(config, "end")
    assert end["reason"] == "terminated" and "final_val_loss" not in end

    before = [path.stat().st_mtime_ns for path in saved]
    assert build(config).fit() == "finished"
    assert [path.stat().st_mtime_ns for path in saved] == before
    [end] = events(config, "end")
    assert end["final_val_loss"] == evaluate_run(config.out_dir, device="cpu").loss
    assert build_trainer(config, explicit=()) == "finished"


def test_a_second_signal_skips_the_evaluation_of_a_stopped_run(
    config, monkeypatch, messages
) -> None:
    evaluate = final_evaluation._evaluate

    def evaluate_with_signal(*args):
        assert last(config).name == "step-000009"
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    trainer = build(dataclasses.replace(config, **SUBSET))
    observe = trainer.report.log_step

    def log_and_stop(event):
        observe(event)
        if event["step"] == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.report, "log_step", log_and_stop)
    monkeypatch.setattr(final_evaluation, "_evaluate", evaluate_with_signal)
    assert trainer.fit() == "interrupted"
    first, second = [line for line in messages if "Ctrl-C again" in line]
    assert "quits without saving" in first
    assert "All is saved" in second
    [end] = events(config, "end")
    assert end["reason"] == "interrupted" and "final_val_loss" not in end


def test_its_time_is_estimated_from_the_last_evaluation_and_not_from_the_steps(
    config, monkeypatch
) -> None:
    monkeypatch.setattr(final_evaluation, "MAX_FRACTION", 0.0)
    monkeypatch.setattr(final_evaluation, "MAX_SECONDS", 1e6)
    trainer = build(dataclasses.replace(config, **SUBSET))
    trainer.state.seconds = 1e12  # plots, samples and other programs count
    trainer.fit()
    [end] = events(config, "end")
    assert end["final_val_loss"] == evaluate_run(config.out_dir, device="cpu").loss


def test_a_time_limit_that_ends_meanwhile_leaves_a_few_seconds(config, monkeypatch) -> None:
    config = dataclasses.replace(config, **SUBSET)
    for allowed in (10.0, -1.0):
        now = [0.0]
        trainer = build(dataclasses.replace(config, restart=True))
        clock = SimpleNamespace(monotonic=lambda now=now: now[0])
        monkeypatch.setattr(signals, "time", clock)
        trainer.stop_signal = StopSignal(1)
        monkeypatch.setattr(final_evaluation, "MAX_SECONDS_AFTER_STOP", allowed)
        evaluate = final_evaluation._evaluate

        def late(*args, now=now, evaluate=evaluate):
            now[0] = 61.0
            return evaluate(*args)

        monkeypatch.setattr(final_evaluation, "_evaluate", late)
        assert trainer.fit() == "finished"
        assert ("final_val_loss" in events(config, "end")[0]) == (allowed > 0)


def test_a_damaged_best_checkpoint_does_not_fail_the_run(config, monkeypatch, messages) -> None:
    trainer = build(dataclasses.replace(config, **SUBSET))
    make_best(trainer, 4)
    store = trainer.saver.store
    save = store.save

    def save_and_damage(step, *args, **kwargs):
        name = save(step, *args, **kwargs)
        (store.path_of(step) / "model.safetensors").write_bytes(b"damaged")
        return name

    monkeypatch.setattr(store, "save", save_and_damage)
    assert trainer.fit() == "finished"
    assert any("model.safetensors" in line and "warning" in line for line in messages)
    assert "final_val_loss" not in events(config, "end")[0]


def test_a_diverged_model_has_no_final_loss(config) -> None:
    trainer = build(dataclasses.replace(config, **SUBSET, max_steps=2, warmup_steps=0))
    with torch.no_grad():
        trainer.step_fn.model.transformer["wpe"].weight.fill_(math.nan)
    with pytest.raises(Exception, match="diverged"):
        trainer.fit()
    assert "final_val_loss" not in events(config, "end")[0]
