"""Questions to a model: how rows read, and answers against a plain loop over its logits."""

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

FLOAT32 = Precision(torch.float32, "to compare")
ROW = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "endings": ["is using wrap. [step] Then  rest", " [title] rips level tiles off.", "a", "bb"],
    "label": "3",
}


@pytest.fixture
def writer(device) -> LanguageModel:
    # More rows than bytes: none of them counts.
    model = GPT(GPTConfig(block_size=24, vocab_size=320, n_layer=2, n_head=2, n_embd=16))
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in model.parameters():
            # As drawn, it finds all letters about equally likely.
            parameter.mul_(4)
    return LanguageModel(model.to(device), from_name("byte", ""))


def by_a_plain_loop(writer: LanguageModel, beginning: str, ending: str) -> LogLikelihood:
    ids = writer.encode(beginning + ending)
    count = len(writer.encode(ending))
    ids = ids[-(writer.model.config.block_size + 1) :]
    logprobs = writer.logits(ids[:-1]).double().log_softmax(-1)
    its = range(len(ids) - 1 - count, len(ids) - 1)
    total = sum(float(logprobs[i, ids[i + 1]]) for i in its)
    return LogLikelihood(total, all(int(logprobs[i].argmax()) == ids[i + 1] for i in its))


@pytest.mark.parametrize("at_once", [1, 40, 8192])
def test_answers_are_those_of_a_plain_loop(writer, monkeypatch, at_once) -> None:
    monkeypatch.setattr(tasks, "MAX_BATCH_TOKENS", at_once)
    dice = torch.Generator().manual_seed(at_once)

    def words(least: int, most: int) -> str:
        count = int(torch.randint(least, most, (1,), generator=dice))
        return bytes(torch.randint(97, 123, (count,), generator=dice).tolist()).decode()

    # Some are longer than the model has places for.
    questions = [
        Example(words(1, 40), tuple(f" {words(1, 12)}" for _ in range(n))) for n in (1, 4, 2, 4)
    ]
    # And one ending is what the model itself would write, if that is a letter to be written.
    for start in (f"{letter}b" for letter in "abcdefghijklmnopqrstuvwxyz"):
        next_id = int(writer.logits(writer.encode(start))[-1, :256].argmax())
        if 32 < next_id < 127:
            questions.append(Example(start, (chr(next_id),)))
            break
    told: list[tuple[int, int]] = []
    found = score_choices(
        writer, questions, FLOAT32, progress=lambda *told_of: told.append(told_of)
    )
    assert told[-1] == (12, 12)
    for question, given in zip(questions, found, strict=True):
        for ending, one in zip(question.choices, given, strict=True):
            plain = by_a_plain_loop(writer, question.context, ending)
            assert one.loglikelihood == pytest.approx(plain.loglikelihood, abs=1e-3)
            assert one.is_greedy == plain.is_greedy
    assert found[-1][0].is_greedy


def harness_pair(writer: LanguageModel, context: str, continuation: str) -> tuple[list, list]:
    """As `_encode_pair` of lm-evaluation-harness 0.4.13 has it for causal models."""
    n_spaces = len(context) - len(context.rstrip())
    if n_spaces > 0:
        continuation = context[-n_spaces:] + continuation
        context = context[:-n_spaces]
    whole_enc = writer.encode(context + continuation)
    context_enc = writer.encode(context)
    return context_enc, whole_enc[len(context_enc) :]


@pytest.mark.parametrize("blanks", ["", " ", "  ", "\n", " \n ", "\t"])
@pytest.mark.parametrize("ending", [" roof", "roof", " 's", "  two"])
def test_blanks_at_the_end_of_a_beginning_are_the_endings(tiny_model, blanks, ending) -> None:
    gpt2 = LanguageModel(tiny_model, from_name("gpt2", ""))
    beginning = f"A man{blanks}"
    context, continuation = harness_pair(gpt2, beginning, ending)
    assert tasks._encoded(gpt2, beginning, ending) == ([*context, *continuation], len(continuation))


@pytest.mark.parametrize("beginning", ["", " "])
def test_an_ending_without_a_beginning_is_asked_behind_an_empty_prompt(
    tiny_model, beginning
) -> None:
    tokenizer = from_name("gpt2", "")
    tokenizer.prepends_eot = True
    gpt2 = LanguageModel(tiny_model, tokenizer)
    ids = gpt2.encode(f"{beginning}a roof")
    assert tasks._encoded(gpt2, beginning, "a roof") == ([50256, *ids], len(ids))


def test_the_likeliest_is_told_apart_where_bfloat16_would_not(tiny_model) -> None:
    """Two ids whose logits differ by less than bfloat16 can tell."""
    with torch.no_grad():
        table = tiny_model.transformer["wte"].weight
        table.mul_(0)
        tiny_model.transformer["ln_f"].bias.fill_(1)
        table[5], table[3] = 1.0005, 1.0
    writer = LanguageModel(tiny_model, CharTokenizer("abcdefgh"))
    bf16 = Precision(torch.bfloat16, "")
    [[f, d]] = score_choices(writer, [Example("a", ("f", "d"))], bf16)
    assert (f.is_greedy, d.is_greedy) == (True, False)


def test_hellaswags_rows_are_cleaned_as_the_harness_does() -> None:
    question = parse_hellaswag(ROW)
    assert question.context == "Roof shingle removal: A man is sitting on a roof. He"
    # A mark at the beginning leaves its blank there.
    kept = (" is using wrap. Then rest", "  rips level tiles off.", " a", " bb")
    assert question.choices == kept
    assert question.label == 3
    with pytest.raises(ValueError, match="label 4"):
        parse_hellaswag(ROW | {"label": 4})


def test_lambadas_last_word_is_the_ending() -> None:
    assert parse_lambada({"text": "he said to  her"}) == Example("he said to ", (" her",))
    with pytest.raises(ValueError, match="no last word"):
        parse_lambada({"text": "word"})


def test_scores_by_likelihood_and_by_likelihood_a_character() -> None:
    questions = [Example("a", (" b", " cccc"), 1), Example("a", (" b", " cccc"), 0)]
    answers = [[LogLikelihood(-2.0, False), LogLikelihood(-4.0, True)]] * 2
    score = tasks.score_hellaswag(questions, answers)
    assert (score["acc"], score["acc_norm"]) == (0.5, 0.5)
    assert tasks.score_hellaswag(questions[:1], answers[:1])["acc_norm"] == 1.0
    assert score["acc_stderr"] == 0.5
    last = tasks.score_lambada(
        [questions[0]] * 2, [[LogLikelihood(-1.0, True)], [LogLikelihood(-3.0, False)]]
    )
    assert (last["acc"], last["perplexity"]) == (0.5, math.exp(2))


@pytest.fixture
def run(program, play) -> None:
    more = ("--tokenizer", "byte", "--max_steps", 2, "--input", play, "--out_dir", "run")
    assert program(*DEBUG, *more).code == 0


EVAL = ("eval", "run", "--device", "cpu", "--tasks")


def test_questions_of_files_are_put_to_a_run(program, run, play) -> None:
    rows = [ROW, ROW | {"label": 0}]
    Path("h.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    Path("l.jsonl").write_text(json.dumps({"text": "to be or not to be"}) + "\n")
    both = "hellaswag=h.jsonl, lambada=l.jsonl"
    done = program(*EVAL, both, "--json")
    assert (done.code, done.err) == (0, "")
    scores = json.loads(done.out)["tasks"]
    assert [score["questions"] for score in scores.values()] == [2, 1]
    # Of two questions that differ in what is right, at most one can be answered rightly.
    assert scores["hellaswag"]["acc"] in (0.0, 0.5)
    assert scores["lambada"]["perplexity"] > 1
    said = program(*EVAL, both, "--data", play, "--limit", 1).out.splitlines()
    assert [line.split()[0] for line in said] == ["loss", "hellaswag:", "lambada:"]
    assert said[1].endswith("of 1 questions")


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("lambada=none.jsonl", "none.jsonl: there is no such file"),
        ("lambada=bad.jsonl", "bad.jsonl, line 1: not an example of lambada ('text' is missing)"),
        ("lambada=list.jsonl", "line 1: not a JSON object"),
        ("lambada=broken.jsonl", "not JSON lines"),
        ("lambada=empty.jsonl", "there are no examples"),
    ],
)
def test_questions_that_cannot_be_read_are_refused_with_the_place(program, tasks, words) -> None:
    texts = {"bad": '{"txt": 1}', "list": "[1]", "broken": "{", "empty": ""}
    for name, text in texts.items():
        Path(f"{name}.jsonl").write_text(text)
    done = program(*EVAL, tasks)
    assert (done.code, words in done.err, len(done.err.splitlines())) == (2, True, 1), done.err


def test_without_a_file_they_come_from_the_hub(program, run, monkeypatch) -> None:
    asked = []

    def load_dataset(source: str, *, split: str) -> list[dict]:
        asked.append((source, split))
        if source.startswith("Rowan"):
            raise ConnectionError("no route\nto host")
        return [{"text": "to be or not to be"}]

    monkeypatch.setitem(sys.modules, "datasets", None)
    done = program(*EVAL, "lambada")
    assert (done.code, "pip install -e '.[tasks]'" in done.err) == (2, True), done.err
    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    fake.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert program(*EVAL, "lambada").out.endswith("of 1 questions\n")
    done = program(*EVAL, "hellaswag")
    assert done.code == 2
    assert "cannot be downloaded: no route: try again" in done.err
    assert "--tasks hellaswag=FILE.jsonl" in done.err
    assert asked == [("EleutherAI/lambada_openai", "test"), ("Rowan/hellaswag", "validation")]


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_questions_from_a_pipe_or_without_an_end_are_refused(program, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_text("[" * 2**21)
    for name, why in (("pipe", "a named pipe"), ("/dev/zero", "a device"), ("long", "too long")):
        done = program("eval", "run", "--tasks", f"hellaswag={name}")
        assert done.code == 2
        assert why in done.err
