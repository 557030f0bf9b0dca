import dataclasses

import pytest

from gptforge.builders.prompts import MAX_PROMPTS, find_prompts, suggest_prompts
from gptforge.config import Config

TITLE_CASE = "Romeo:\nBut soft,\n\nJuliet:\nAy me!\n\n"
CAPITALS = "ROMEO:\nBut soft,\n\nFirst Citizen:\nSpeak.\n\n"


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        (TITLE_CASE * 5, ["Romeo:\n", "Juliet:\n"]),
        (CAPITALS * 5, ["ROMEO:\n", "First Citizen:\n"]),
        ("A: Hello, Bob.\nB: Hello, Ann.\n" * 5, ["A:", "B:"]),
        ("Élodie : Bonjour.\nÉmile : Bonsoir.\n" * 5, ["Élodie :", "Émile :"]),
        # A scene in a novel.
        ("It was the best of times\n" * 999 + CAPITALS * 3, ["It was the best"]),
        ("one two three four five\n\nshort\n\nsix seven eight nine ten\n",
         ["one two three four", "six seven eight nine"]),
        ("", []),
    ],
)  # fmt: skip
def test_prompts_stand_in_the_text(text, prompts) -> None:
    assert find_prompts(text) == prompts
    assert all(prompt in text for prompt in prompts)


def test_the_number_of_prompts_is_limited() -> None:
    lines = [f"line {n} of a long text\n" for n in range(500)]
    prompts = find_prompts("".join(lines))
    assert len(prompts) == MAX_PROMPTS
    assert prompts[0] == "line 0 of a" and prompts[-1] > "line 4"


def test_prompts_are_from_the_training_text_or_the_samples(tmp_path) -> None:
    path, config = tmp_path / "play.jsonl", Config()
    config = dataclasses.replace(config, input=str(path))
    sample = CAPITALS * 5
    (tmp_path / "samples.md").write_text(f"## After 9 steps\n\n~~~text\n{sample}\n~~~\n")
    assert suggest_prompts(str(tmp_path), config) == ["ROMEO:\n", "First Citizen:\n"]
    path.write_text('{"text": "A: one\\nB: two\\n"}\n' * 5)
    assert suggest_prompts(str(tmp_path), config) == ["A:", "B:"]
