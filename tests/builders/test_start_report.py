import dataclasses
from pathlib import Path

import pytest
import torch

from gptforge.builders.start_report import model_summary
from gptforge.config import GPTConfig
from gptforge.model import GPT
from tests.training.runs import build, events

GOLDEN = Path(__file__).parents[1] / "golden"


def test_summary_of_gpt2() -> None:
    config = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    expected = (GOLDEN / "summary-gpt2.txt").read_text(encoding="utf-8")
    with torch.device("meta"):
        model = GPT(config)
    assert model_summary(model) + "\n" == expected


def test_summary_of_a_single_block() -> None:
    lines = model_summary(GPT(GPTConfig(8, 16, 1, 1, 4))).splitlines()
    assert "      (0): Block(" in lines
    assert "      └─Block 0: (244 parameters)" in lines


@pytest.mark.parametrize(("eval_tokens", "evaluated"), [(0, ""), (100, "128 "), (9999, "")])
def test_the_first_lines_name_the_tokens_that_evaluations_read(
    config, messages, eval_tokens, evaluated
) -> None:
    build(dataclasses.replace(config, eval_tokens=eval_tokens, max_steps=5)).fit()
    [line] = [line for line in messages if line.startswith("text: ")]
    assert (f"held out, {evaluated}of them" in line) == bool(evaluated)
    assert ("of them" in line) == bool(evaluated)
    read = {event["val_tokens"] for event in events(config, "eval")}
    assert not evaluated or read == {int(evaluated)}
