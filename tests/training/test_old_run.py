"""A run that version 0.1 started resumes with today's program, by the same command."""

import shlex
import shutil
from pathlib import Path

import pytest

from gptforge.cli import main
from gptforge.config import Config
from gptforge.training import final_evaluation
from tests.training.runs import events

RUN = Path(__file__).parents[1] / "golden" / "run-0.1"
# Steps 8 to 23 of an uninterrupted run of version 0.1, torch 2.13 on a CPU.
LOSSES = [
    *(5.377722, 5.358166, 5.322944, 5.306563, 5.285024, 5.255175, 5.26987, 5.245661),
    *(5.238819, 5.203977, 5.218272, 5.216479, 5.193497, 5.19318, 5.179305, 5.193849),
]
FLAGS = shlex.split(
    "--preset debug --device cpu --n_layer 1 --n_embd 16 --n_head 2 --context_length 16"
    " --block_size 16 --batch_size 4 --gradient_accumulation_steps 2 --warmup_steps 4"
    " --eval_every 8 --eval_tokens 512 --save_every 8 --sample_every 0 --keep 2 --stagger true"
    " --log_every 1 --products cublas --tokenizer byte --max_steps 24"
)


def test_run_of_version_0_1_resumes(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # All held-out text of the bundled one would take most of the time.
    monkeypatch.setattr(final_evaluation, "MAX_SECONDS", 0.0)
    shutil.copytree(RUN, tmp_path / "run-0.1", symlinks=True)
    assert main([*FLAGS, "--out_dir", "run-0.1"]) == 0
    config = Config(out_dir="run-0.1")
    train = [event for event in events(config, "train") if event["step"] >= 8]
    assert [event["loss"] for event in train] == pytest.approx(LOSSES, abs=2e-4)
    assert [event["step"] for event in events(config, "eval")] == [8, 16, 24]
    text = (tmp_path / "run-0.1/checkpoints/last/config.toml").read_text()
    assert "keep_checkpoints = 2" in text
    assert "random_offset = true" in text
    # No early stopping, which version 0.1 did not have.
    assert "patience = 0" in text
