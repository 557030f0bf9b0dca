"""Model cards: each figure is that of the exported checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from gptforge.builders.export_model import read_origin
from gptforge.builders.load_model import load_saved
from gptforge.convert.model_card import model_card
from gptforge.files import set_link


def card_of(run: str) -> str:
    saved = load_saved(run)
    return model_card(saved.bundle, read_origin(saved), title="title")


def add_event(run: str, **event: object) -> None:
    with (Path(run) / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(event) + "\n")


def test_the_loss_is_that_of_the_checkpoint(run) -> None:
    values = {"final_val_bpb": 1.0, "final_val_nats_per_char": 1.0, "final_val_tokens": 99}
    # A longer wsd run whose best checkpoint is of the decay that it dropped.
    checkpoints = Path(run) / "checkpoints"
    shutil.copytree(checkpoints / "step-000020", checkpoints / "step-000020.decayed-1")
    set_link(checkpoints / "best", "step-000020.decayed-1")
    add_event(run, event="end", reason="finished", best_step=20, final_val_loss=0.5, **values)
    best = "| Held-out loss | 0.5000 nats per token, over 99 tokens |"
    assert best in card_of(run) and best in card_of(f"{run}/checkpoints/best")
    same_step = card_of(f"{run}/checkpoints/step-000020")
    assert "Held-out loss" in same_step and best not in same_step
    add_event(run, event="resume", step=20)  # there is no final evaluation any more
    assert "Held-out loss" not in card_of(run)
    assert card_of(f"{run}/checkpoints/step-000020") == same_step


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_both_learning_rates_of_muon_are_named(run, muon_lr) -> None:
    saved = load_saved(run)
    origin = read_origin(saved)
    config = dataclasses.replace(origin.config, optimizer="muon", muon_lr=muon_lr)
    card = model_card(saved.bundle, dataclasses.replace(origin, config=config), title="title")
    [row] = [line for line in card.splitlines() if line.startswith("| Optimizer")]
    end = "; Muon's matrices 20 times that |" if muon_lr else " |"
    assert row == f"| Optimizer | muon, learning rate 0.001 to 0.0001, cosine{end}"


def test_the_example_fits_the_context(run) -> None:
    # The run has 32 positions, and transformers raises an IndexError beyond them.
    [call] = [line for line in card_of(run).splitlines() if "max_new_tokens=" in line]
    assert "max_new_tokens=28" in call
