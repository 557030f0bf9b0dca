"""Arguments of the library: one value for a list, NumPy and torch numbers, and wrong types."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from gptforge.errors import UserError
from gptforge.inference.language_model import LanguageModel
from gptforge.inference.sampling import SamplingParams
from gptforge.tokenizers.char import CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def model(tiny_model) -> LanguageModel:
    return LanguageModel(tiny_model, CharTokenizer(ALPHABET))


def test_a_string_is_one_stop_string(model) -> None:
    full = model.generate("to be", 50, seed=1)
    # Its characters occur earlier, one by one, than the full string.
    stop = full[30:33]
    assert min(full.index(letter) for letter in stop) < full.index(stop)
    expected = full[: full.index(stop)]
    assert model.generate("to be", 50, seed=1, stop=stop) == expected
    assert "".join(model.stream("to be", 50, seed=1, stop=stop)) == expected
    [completion] = model.generate_batch("to be", 50, seeds=1, stop=stop)
    assert (completion.text, completion.finish_reason) == (expected, "stop")
    assert model.generate("to be", 50, seed=1, stop=None) == full


def test_a_string_is_one_prompt_and_prompts_may_be_any_iterable(model) -> None:
    assert model.generate_batch("romeo", 9, seeds=3) == model.generate_batch(
        ["romeo"], 9, seeds=[3]
    )
    both = model.generate_batch(["a", "b"], 9, seeds=[1, 2])
    assert model.generate_batch((letter for letter in "ab"), 9, seeds=np.array([1, 2])) == both


def test_numpy_and_torch_numbers_are_accepted(model) -> None:
    settings = {"temperature": np.float32(0.5), "top_k": np.int64(4), "seed": np.int64(3)}
    plain = model.generate("a", 9, temperature=0.5, top_k=4, seed=3)
    assert model.generate("a", np.int64(9), **settings) == plain
    ids = model.encode("hello")
    for many in (np.array(ids), torch.tensor(ids)):
        assert model.decode(many) == "hello"
        assert torch.equal(model.logits(many), model.logits(ids))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_an_array_without_dimensions_is_one_number(model, make) -> None:
    best = model.logits(make(3))[-1].argmax()
    assert model.decode(best) == model.decode([int(best)])
    plain = model.generate_batch("a", 9, seeds=3, stop_token_ids=5)
    assert model.generate_batch("a", 9, seeds=make(3), stop_token_ids=make(5)) == plain
    assert model.generate_batch(["a"], 9, seeds=make([3]), stop_token_ids=make([5])) == plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": None}, r"^top_k must be a whole number, 0 or more \(0: all tokens\), not"),
        ({"top_k": 5.0}, "^top_k must be a whole number"),
        ({"top_p": None}, "^top_p must be a number"),
        ({"temperature": "1"}, "^temperature must be a number"),
        ({"temperature": 10**400}, "^temperature must be a number, 0 or more, not 1000"),
        ({"temperature": 10**5000}, "^temperature must be a number.* too long to show$"),
        ({"temperature": math.nan}, "^temperature must be a number"),
        ({"temperature": math.inf}, "^temperature must be a number"),
        ({"temperature": Fraction(1, 3)}, "^temperature must be a number"),
        ({"top_p": Fraction(1, 3)}, "^top_p must be a number"),
        ({"top_p": 10**5000}, "^top_p must be a number.* too long to show$"),
        ({"top_k": -(10**5000)}, "^top_k must be a whole number.* too long to show$"),
        ({"max_new_tokens": 10**5000}, "^max_new_tokens a value .* too long to show: at most"),
        ({"seed": 10**5000}, "^seed must be a whole number.* too long to show$"),
        ({"max_new_tokens": None}, "^max_new_tokens must be a whole number"),
        ({"max_new_tokens": 3.0}, "^max_new_tokens must be a whole number"),
        ({"seed": "a"}, "^seed must be a whole number"),
        ({"seed": 1.5}, "^seed must be a whole number"),
        ({"stop": [7]}, "each of stop must be a string, not 7"),
        ({"stop": 7}, "stop must be a string or several, not 7"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_an_argument_of_the_wrong_type_is_named(model, method, options, words) -> None:
    with pytest.raises(UserError, match=words):
        getattr(model, method)("a", **options)


@pytest.mark.parametrize("temperature", [2**63, 10**300])
def test_a_huge_temperature_makes_all_tokens_equally_likely(model, temperature) -> None:
    texts = [model.generate("a", 20, seed=1, temperature=t) for t in (temperature, 1e30)]
    assert texts[0] == texts[1]
    assert model.generate("a", 20, seed=1, top_k=10**400) == model.generate("a", 20, seed=1)


@pytest.mark.parametrize("prompt", [["a"], [], None, b"a", 7])
@pytest.mark.parametrize("method", ["generate", "stream", "stream_tokens", "encode"])
def test_a_prompt_that_is_not_a_string_is_refused(model, method, prompt) -> None:
    with pytest.raises(UserError, match=r"the (prompt|text) must be a string, not"):
        getattr(model, method)(prompt)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate_batch([]), "give at least one prompt"),
        (lambda model: model.generate_batch(["a", None]), "each of the prompts must be a string"),
        (lambda model: model.generate_batch(["a", "b"], seeds=1), "2 prompts, 1 seeds"),
        (lambda model: model.generate_batch("a", 3, 0.8), "sampling must be SamplingParams"),
        (lambda model: model.generate_batch("a", 3, SamplingParams(top_k=None)), "^top_k"),
        (lambda model: model.generate_batch("a", 3, stop_token_ids="b"), "each of stop_token_ids"),
        (lambda model: model.stream_tokens("a", top_logprobs=-1), "top_logprobs must be"),
        (lambda model: model.decode([28]), "each of the ids must be below 28, not 28"),
        (lambda model: model.decode("abc"), "each of the ids must be a whole number"),
        (lambda model: model.logits([28]), "each of the ids must be below 28, not 28"),
        (lambda model: model.logits([1.5]), "each of the ids must be a whole number"),
        (lambda model: model.logits(torch.ones(1, 2, dtype=int)), "each of the ids must be a"),
    ],
)
def test_other_wrong_arguments_are_refused(model, call, words) -> None:
    with pytest.raises(UserError, match=words):
        call(model)
