"""What callers of the library give: one thing where several may stand, numpy's, or nonsense."""

import numpy as np
import pytest
import torch

from gptforge.errors import UserError
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.tokenizers.char import CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def writer(tiny_model) -> LanguageModel:
    return LanguageModel(tiny_model, CharTokenizer(ALPHABET))


def test_a_string_is_one_stop_text_not_its_characters(writer) -> None:
    whole = writer.generate("to be", 50, seed=1)
    # Its letters come earlier, one by one, than all of it together.
    stop = whole[30:33]
    assert min(whole.index(letter) for letter in stop) < whole.index(stop)
    expected = whole[: whole.index(stop)]
    assert writer.generate("to be", 50, seed=1, stop=stop) == expected
    assert "".join(writer.stream("to be", 50, seed=1, stop=stop)) == expected
    [writing] = writer.write("to be", 50, seeds=1, stop=stop)
    assert (writing.text, writing.finish_reason) == (expected, "stop")
    assert writer.generate("to be", 50, seed=1, stop=None) == whole


def test_a_string_is_one_prompt_and_prompts_may_come_from_anywhere(writer) -> None:
    assert writer.write("romeo", 9, seeds=3) == writer.write(["romeo"], 9, seeds=[3])
    both = writer.write(["a", "b"], 9, seeds=[1, 2])
    assert writer.write((letter for letter in "ab"), 9, seeds=np.array([1, 2])) == both


def test_numbers_of_numpy_and_torch_are_numbers(writer) -> None:
    settings = {"temperature": np.float32(0.5), "top_k": np.int64(4), "seed": np.int64(3)}
    plain = writer.generate("a", 9, temperature=0.5, top_k=4, seed=3)
    assert writer.generate("a", np.int64(9), **settings) == plain
    ids = writer.encode("hello")
    for many in (np.array(ids), torch.tensor(ids)):
        assert writer.decode(many) == "hello"
        assert torch.equal(writer.logits(many), writer.logits(ids))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": None}, r"--top_k must be a whole number, 0 or more \(0: draw among all\), not"),
        ({"top_k": 5.0}, "--top_k must be a whole number"),
        ({"top_p": None}, "--top_p must be a number"),
        ({"temperature": "1"}, "--temperature must be a number"),
        ({"max_new_tokens": None}, "--max_new_tokens must be a whole number"),
        ({"max_new_tokens": 3.0}, "--max_new_tokens must be a whole number"),
        ({"seed": "a"}, "--seed must be a whole number"),
        ({"seed": 1.5}, "--seed must be a whole number"),
        ({"stop": [7]}, "each of stop must be a string, not 7"),
        ({"stop": 7}, "stop must be a string or several, not 7"),
    ],
)
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_a_setting_of_another_type_is_named(writer, way, options, words) -> None:
    with pytest.raises(UserError, match=words):
        getattr(writer, way)("a", **options)


@pytest.mark.parametrize("prompt", [["a"], [], None, b"a", 7])
@pytest.mark.parametrize("way", ["generate", "stream", "tokens", "encode"])
def test_a_prompt_that_is_no_text_is_refused(writer, way, prompt) -> None:
    with pytest.raises(UserError, match=r"the (prompt|text) must be a string, not"):
        getattr(writer, way)(prompt)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda writer: writer.write([]), "give one prompt at least"),
        (lambda writer: writer.write(["a", None]), "each of the prompts must be a string"),
        (lambda writer: writer.write(["a", "b"], seeds=1), "2 prompts, 1 seeds"),
        (lambda writer: writer.write("a", 3, 0.8), "sampling must be Sampling"),
        (lambda writer: writer.write("a", 3, SamplingParams(top_k=None)), "--top_k"),
        (lambda writer: writer.write("a", 3, stop_ids="b"), "each of stop_ids"),
        (lambda writer: writer.tokens("a", alternatives=-1), "alternatives must be"),
        (lambda writer: writer.decode([28]), "each of the ids must be below 28, not 28"),
        (lambda writer: writer.decode("abc"), "each of the ids must be a whole number"),
        (lambda writer: writer.logits([28]), "each of the ids must be below 28, not 28"),
        (lambda writer: writer.logits([1.5]), "each of the ids must be a whole number"),
    ],
)
def test_other_mistakes_are_said_in_words(writer, call, words) -> None:
    with pytest.raises(UserError, match=words):
        call(writer)
