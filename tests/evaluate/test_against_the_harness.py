"""The same questions, answers and scores as lm-evaluation-harness's own code; needs lm_eval."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import write_hf
from gptforge.device import Precision
from gptforge.evaluate import tasks
from gptforge.evaluate.tasks import Example
from gptforge.inference.language_model import LanguageModel
from gptforge.model import GPT
from gptforge.tokenizers import from_name

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
SCENES, PAGES = 20, 20
PLAY = Path(__file__).parents[2] / "input.txt"


class Rows(list):
    """As much of a dataset as the harness asks for."""

    def map(self, work) -> list:
        return [work(row) for row in self]


def test_questions_answers_and_scores_are_the_harness_s(tmp_path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    dice, words = random.Random(1), PLAY.read_text(encoding="utf-8")[20_000:90_000].split()

    def some(least: int, most: int) -> str:
        return " ".join(dice.choices(words, k=dice.randint(least, most)))

    marks = ("", " [title] Next", "  [step]")
    rows = [
        {
            "ind": number,
            "activity_label": some(1, 3),
            "ctx_a": f"{some(3, 20)}. ",
            # A mark at the end leaves a blank there.
            "ctx_b": some(0, 4) + dice.choice(("", " [title]")),
            "endings": [f"{some(2, 20)}{dice.choice(marks)} {some(0, 2)}" for _ in range(4)],
            "label": str(dice.randrange(4)),
        }
        for number in range(SCENES)
    ]
    questions = [tasks.parse_hellaswag(row) for row in rows]
    theirs = process_docs(Rows(rows))
    asked = []
    for question, doc in zip(questions, theirs, strict=True):
        assert (question.context, question.label) == (doc["query"], doc["gold"])
        assert [ending[1:] for ending in question.choices] == doc["choices"]
        asked += [(doc["query"], f" {choice}") for choice in doc["choices"]]
    assert any(question.context.endswith(" ") for question in questions)
    # Longer than the model has places for, some of them.
    for text in (some(5, 70) for _ in range(PAGES)):
        questions.append(tasks.parse_lambada({"text": text}))
        *before, last = text.split(" ")
        asked.append((" ".join(before), f" {last}"))
    # Beginnings that end in blanks, and none at all: the harness puts the end-of-text mark there.
    for blanks in (" ", "  ", "\n", " \n\t", ""):
        beginning = f"{some(3, 9)}{blanks}" if blanks else ""
        questions.append(Example(beginning, (f" {some(1, 3)}", some(1, 2))))
        asked += [(beginning, ending) for ending in questions[-1].choices]

    tokenizer = from_name("gpt2", "")
    tokenizer.prepends_eot = True
    model = GPT(GPTConfig(64, 50304, 2, 4, 64)).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    write_hf(tmp_path, ModelBundle(model.config, tensors, tokenizer), card="# A model\n")
    harness = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", max_length=64)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    right = harness.loglikelihood(requests, disable_tqdm=True)

    writer = LanguageModel(model, tokenizer)
    answers = tasks.score_choices(writer, questions, Precision(torch.float32, "to compare"))
    flat = [one for given in answers for one in given]
    for one, (logprob, is_greedy) in zip(flat, right, strict=True):
        assert one.loglikelihood == pytest.approx(logprob, abs=1e-3)
        assert one.is_greedy == is_greedy
    score = tasks.score_hellaswag(questions[:SCENES], answers[:SCENES])
    sums = np.array([logprob for logprob, _ in right[: 4 * SCENES]]).reshape(SCENES, 4)
    lengths = np.array([[len(choice) for choice in doc["choices"]] for doc in theirs])
    gold = np.array([doc["gold"] for doc in theirs])
    assert score["acc"] == (sums.argmax(1) == gold).mean()
    assert score["acc_norm"] == ((sums / lengths).argmax(1) == gold).mean()
    pages = slice(SCENES, SCENES + PAGES)
    last = tasks.score_lambada(questions[pages], answers[pages])
    mean = np.mean([logprob for logprob, _ in right[4 * SCENES : 4 * SCENES + PAGES]])
    assert last["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-3)
