"""Examples, log-likelihoods and scores equal those of lm-evaluation-harness; needs lm_eval."""

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
    """The part of a `datasets.Dataset` that the harness uses."""

    def map(self, function) -> list:
        return [function(row) for row in self]


def test_examples_loglikelihoods_and_scores(tmp_path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    rng, words = random.Random(1), PLAY.read_text(encoding="utf-8")[20_000:90_000].split()

    def some(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    tags = ("", " [title] Next", "  [step]")
    rows = [
        {
            "ind": number,
            "activity_label": some(1, 3),
            "ctx_a": f"{some(3, 20)}. ",
            # A tag at the end leaves a blank there.
            "ctx_b": some(0, 4) + rng.choice(("", " [title]")),
            "endings": [f"{some(2, 20)}{rng.choice(tags)} {some(0, 2)}" for _ in range(4)],
            "label": str(rng.randrange(4)),
        }
        for number in range(SCENES)
    ]
    examples = [tasks.parse_hellaswag(row) for row in rows]
    docs = process_docs(Rows(rows))
    pairs = []
    for example, doc in zip(examples, docs, strict=True):
        assert (example.context, example.label) == (doc["query"], doc["gold"])
        assert [choice[1:] for choice in example.choices] == doc["choices"]
        pairs += [(doc["query"], f" {choice}") for choice in doc["choices"]]
    assert any(example.context.endswith(" ") for example in examples)
    # Some are longer than the block size.
    for text in (some(5, 70) for _ in range(PAGES)):
        examples.append(tasks.parse_lambada({"text": text}))
        *before, last = text.split(" ")
        pairs.append((" ".join(before), f" {last}"))
    # Contexts that end in blanks, and an empty one: the harness puts the end-of-text id there.
    for blanks in (" ", "  ", "\n", " \n\t", ""):
        context = f"{some(3, 9)}{blanks}" if blanks else ""
        examples.append(Example(context, (f" {some(1, 3)}", some(1, 2))))
        pairs += [(context, choice) for choice in examples[-1].choices]

    tokenizer = from_name("gpt2", "")
    tokenizer.prepends_eot = True
    model = GPT(GPTConfig(64, 50304, 2, 4, 64)).init_weights(torch.Generator().manual_seed(0))
    tensors = {name: t.detach() for name, t in model.state_dict().items() if "lm_head" not in name}
    write_hf(tmp_path, ModelBundle(model.config, tensors, tokenizer), card="# A model\n")
    harness = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", max_length=64)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = harness.loglikelihood(requests, disable_tqdm=True)

    lm = LanguageModel(model, tokenizer)
    results = tasks.score_choices(lm, examples, Precision(torch.float32, ""))
    flat = [result for choices in results for result in choices]
    for result, (logprob, is_greedy) in zip(flat, expected, strict=True):
        assert result.loglikelihood == pytest.approx(logprob, abs=1e-3)
        assert result.is_greedy == is_greedy
    score = tasks.score_hellaswag(examples[:SCENES], results[:SCENES])
    sums = np.array([logprob for logprob, _ in expected[: 4 * SCENES]]).reshape(SCENES, 4)
    lengths = np.array([[len(choice) for choice in doc["choices"]] for doc in docs])
    gold = np.array([doc["gold"] for doc in docs])
    assert score["acc"] == (sums.argmax(1) == gold).mean()
    assert score["acc_norm"] == ((sums / lengths).argmax(1) == gold).mean()
    pages = slice(SCENES, SCENES + PAGES)
    last = tasks.score_lambada(examples[pages], results[pages])
    mean = np.mean([logprob for logprob, _ in expected[4 * SCENES : 4 * SCENES + PAGES]])
    assert last["perplexity"] == pytest.approx(np.exp(-mean), rel=1e-3)
