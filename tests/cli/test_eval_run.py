"""`gptforge eval` on a run's own held-out text."""

import json
from pathlib import Path

import pytest

from tests.conftest import play_text
from tests.programs import DEBUG, events


def test_json_has_the_loss_of_the_best_checkpoint(program, run) -> None:
    done = program("eval", "run", "--json", "--device", "cpu")
    score = json.loads(done.out)
    evals = [event for event in events() if event["event"] == "eval"]
    best = min(evals, key=lambda event: event["val_loss"])
    assert score["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(best["val_bpb"], rel=1e-5)
    val_text = play_text()[int(len(play_text()) * 0.9) :]
    assert score["tokens"] == len(val_text) - 1


def test_training_text_and_changed_text_are_noticed(program, play) -> None:
    assert program(*DEBUG, "--input", play, "--max_steps", 2, "--out_dir", "run").code == 0
    on_training_text = program("eval", "run", "--data", play, "--device", "cpu")
    assert on_training_text.code == 0
    assert on_training_text.out.startswith(f"loss on {play}")
    assert on_training_text.err != ""
    play.write_text(play.read_text() + "More.")
    changed = program("eval", "run", "--device", "cpu")
    assert changed.code == 2
    assert "has changed" in changed.err


def test_the_bundled_text_is_found_from_any_folder(program, monkeypatch, tmp_path) -> None:
    Path("input.txt").write_bytes((Path(__file__).parents[2] / "input.txt").read_bytes())
    few = ("--val_fraction", 0.002, "--max_steps", 2)
    assert program(*DEBUG, *few, "--out_dir", "run").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program("eval", "../run", "--device", "cpu").code == 0


def test_a_model_without_a_run_needs_data(program, run) -> None:
    (Path("run/checkpoints/last").resolve() / "state.json").unlink()
    done = program("eval", "run/checkpoints/last", "--device", "cpu")
    assert done.code == 2
    assert "--data" in done.err
