"""Parsing rows, and log-likelihoods against a loop over the logits."""

import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.device import Precision
from gptforge.evaluate import tasks
from gptforge.evaluate.tasks import (
    Example,
    LogLikelihood,
    parse_hellaswag,
    parse_lambada,
    score_choices,
)
from gptforge.inference.language_model import LanguageModel
from gptforge.model import GPT
from gptforge.tokenizers import from_name
from gptforge.tokenizers.char import CharTokenizer
from tests.programs import DEBUG

FLOAT32 = Precision(torch.float32, "")
ROW = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "endings": ["is using wrap. [step] Then  rest", " [title] rips level tiles off.", "a", "bb"],
    "label": "3",
}


@pytest.fixture
def lm(device) -> LanguageModel:
    # The embedding has padding rows, which do not count.
    model = GPT(GPTConfig(block_size=24, vocab_size=320, n_layer=2, n_head=2, n_embd=16))
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # as initialized, all letters are about equally likely
    return LanguageModel(model.to(device), from_name("byte", ""))


def loglikelihood_by_token(lm: LanguageModel, context: str, choice: str) -> LogLikelihood:
    ids = lm.encode(context + choice)
    count = len(lm.encode(choice))
    ids = ids[-(lm.model.config.block_size + 1) :]
    logprobs = lm.logits(ids[:-1]).double().log_softmax(-1)
    positions = range(len(ids) - 1 - count, len(ids) - 1)
    total = sum(float(logprobs[i, ids[i + 1]]) for i in positions)
    return LogLikelihood(total, all(int(logprobs[i].argmax()) == ids[i + 1] for i in positions))


@pytest.mark.parametrize("max_batch_tokens", [1, 40, 8192])
def test_loglikelihoods_of_batches(lm, monkeypatch, max_batch_tokens) -> None:
    monkeypatch.setattr(tasks, "MAX_BATCH_TOKENS", max_batch_tokens)
    rng = torch.Generator().manual_seed(max_batch_tokens)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (1,), generator=rng))
        return bytes(torch.randint(97, 123, (count,), generator=rng).tolist()).decode()

    # Some are longer than the block size.
    examples = [
        Example(words(1, 40), tuple(f" {words(1, 12)}" for _ in range(n))) for n in (1, 4, 2, 4)
    ]
    # One choice is the greedy one, if the model finds a printable letter most likely.
    for start in (f"{letter}b" for letter in "abcdefghijklmnopqrstuvwxyz"):
        next_id = int(lm.logits(lm.encode(start))[-1, :256].argmax())
        if 32 < next_id < 127:
            examples.append(Example(start, (chr(next_id),)))
            break
    calls: list[tuple[int, int]] = []
    found = score_choices(lm, examples, FLOAT32, progress=lambda *counts: calls.append(counts))
    assert calls[-1] == (12, 12)
    for example, results in zip(examples, found, strict=True):
        for choice, result in zip(example.choices, results, strict=True):
            expected = loglikelihood_by_token(lm, example.context, choice)
            assert result.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-3)
            assert result.is_greedy == expected.is_greedy
    assert found[-1][0].is_greedy


def harness_pair(lm: LanguageModel, context: str, continuation: str) -> tuple[list, list]:
    """`_encode_pair` of lm-evaluation-harness 0.4.13, for causal models."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = lm.encode(context + continuation)
    context_enc = lm.encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@pytest.mark.parametrize("blanks", ["", " ", "  ", "\n", " \n ", "\t"])
@pytest.mark.parametrize("choice", [" roof", "roof", " 's", "  two"])
def test_blanks_at_the_end_of_the_context_belong_to_the_choice(tiny_model, blanks, choice) -> None:
    gpt2 = LanguageModel(tiny_model, from_name("gpt2", ""))
    context = f"A man{blanks}"
    context_ids, choice_ids = harness_pair(gpt2, context, choice)
    ids, count = tasks._encode_choice(gpt2, context, choice)
    assert (ids, count) == ([*context_ids, *choice_ids], len(choice_ids))


@pytest.mark.parametrize("context", ["", " "])
def test_empty_context_is_an_empty_prompt(tiny_model, context) -> None:
    tokenizer = from_name("gpt2", "")
    tokenizer.prepends_eot = True
    gpt2 = LanguageModel(tiny_model, tokenizer)
    ids = gpt2.encode(f"{context}a roof")
    assert tasks._encode_choice(gpt2, context, "a roof") == ([50256, *ids], len(ids))


def test_greedy_token_is_found_in_float32(tiny_model) -> None:
    # Two logits that are equal in bfloat16.
    with torch.no_grad():
        table = tiny_model.transformer["wte"].weight
        table.mul_(0)
        tiny_model.transformer["ln_f"].bias.fill_(1)
        table[5], table[3] = 1.0005, 1.0
    lm = LanguageModel(tiny_model, CharTokenizer("abcdefgh"))
    bf16 = Precision(torch.bfloat16, "")
    [[f, d]] = score_choices(lm, [Example("a", ("f", "d"))], bf16)
    assert (f.is_greedy, d.is_greedy) == (True, False)


def test_hellaswag_rows_are_cleaned_like_the_harness() -> None:
    example = parse_hellaswag(ROW)
    assert example.context == "Roof shingle removal: A man is sitting on a roof. He"
    # A tag at the start leaves its blank there.
    cleaned = (" is using wrap. Then rest", "  rips level tiles off.", " a", " bb")
    assert example.choices == cleaned
    assert example.label == 3
    with pytest.raises(ValueError, match="label 4"):
        parse_hellaswag(ROW | {"label": 4})


def test_last_word_of_lambada_is_the_choice() -> None:
    assert parse_lambada({"text": "he said to  her"}) == Example("he said to ", (" her",))
    with pytest.raises(ValueError, match="no last word"):
        parse_lambada({"text": "word"})


def test_scores_by_loglikelihood_and_per_character() -> None:
    examples = [Example("a", (" b", " cccc"), 1), Example("a", (" b", " cccc"), 0)]
    answers = [[LogLikelihood(-2.0, False), LogLikelihood(-4.0, True)]] * 2
    score = tasks.score_hellaswag(examples, answers)
    assert (score["acc"], score["acc_norm"]) == (0.5, 0.5)
    assert tasks.score_hellaswag(examples[:1], answers[:1])["acc_norm"] == 1.0
    assert score["acc_stderr"] == 0.5
    last = tasks.score_lambada(
        [examples[0]] * 2, [[LogLikelihood(-1.0, True)], [LogLikelihood(-3.0, False)]]
    )
    assert (last["acc"], last["perplexity"]) == (0.5, math.exp(2))


@pytest.fixture
def run(program, play) -> None:
    more = ("--tokenizer", "byte", "--max_steps", 2, "--input", play, "--out_dir", "run")
    assert program(*DEBUG, *more).code == 0


EVAL = ("eval", "run", "--device", "cpu", "--tasks")


def test_examples_from_files(program, run, play) -> None:
    rows = [ROW, ROW | {"label": 0}]
    Path("h.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    Path("l.jsonl").write_text(json.dumps({"text": "to be or not to be"}) + "\n")
    both = "hellaswag=h.jsonl, lambada=l.jsonl"
    done = program(*EVAL, both, "--json")
    assert (done.code, done.err) == (0, "")
    scores = json.loads(done.out)["tasks"]
    assert [score["questions"] for score in scores.values()] == [2, 1]
    # The two rows differ in the label: at most one can be right.
    assert scores["hellaswag"]["acc"] in (0.0, 0.5)
    assert scores["lambada"]["perplexity"] > 1
    lines = program(*EVAL, both, "--data", play, "--limit", 1).out.splitlines()
    assert [line.split()[0] for line in lines] == ["loss", "hellaswag:", "lambada:"]
    assert lines[1].endswith("of 1 examples")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("lambada=none.jsonl", "none.jsonl: there is no such file"),
        ("lambada=bad.jsonl", "bad.jsonl, line 1: not an example of lambada ('text' is missing)"),
        ("lambada=list.jsonl", "line 1: not a JSON object"),
        ("lambada=broken.jsonl", "not JSON lines"),
        ("lambada=empty.jsonl", "there are no examples"),
    ],
)
def test_invalid_examples_are_refused_with_their_line(program, tasks, message) -> None:
    texts = {"bad": '{"txt": 1}', "list": "[1]", "broken": "{", "empty": ""}
    for name, text in texts.items():
        Path(f"{name}.jsonl").write_text(text)
    done = program(*EVAL, tasks)
    assert (done.code, message in done.err, len(done.err.splitlines())) == (2, True, 1), done.err


def test_examples_from_the_hub(program, run, monkeypatch) -> None:
    loaded = []

    def load_dataset(source: str, *, split: str) -> list[dict]:
        loaded.append((source, split))
        if source.startswith("Rowan"):
            raise ConnectionError("no route\nto host")
        return [{"text": "to be or not to be"}]

    monkeypatch.setitem(sys.modules, "datasets", None)
    done = program(*EVAL, "lambada")
    assert (done.code, "pip install -e '.[tasks]'" in done.err) == (2, True), done.err
    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    # Should transformers be imported meanwhile, it keeps this module and looks for these classes.
    fake.Dataset = fake.IterableDataset = type("Dataset", (), {})
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert program(*EVAL, "lambada").out.endswith("of 1 examples\n")
    done = program(*EVAL, "hellaswag")
    assert done.code == 2
    assert "cannot be downloaded: no route: try again" in done.err
    assert "--tasks hellaswag=FILE.jsonl" in done.err
    assert loaded == [("EleutherAI/lambada_openai", "test"), ("Rowan/hellaswag", "validation")]


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_pipes_and_endless_files_are_refused(program, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("[" * 2**21)
    for name, reason in (("pipe", "a named pipe"), ("/dev/zero", "a device"), ("long", "too long")):
        done = program("eval", "run", "--tasks", f"hellaswag={name}")
        assert done.code == 2
        assert reason in done.err
