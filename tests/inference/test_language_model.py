import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.inference.detokenizer import StopMatcher
from gptforge.inference.language_model import LanguageModel
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def model(tiny_model) -> LanguageModel:
    return LanguageModel(tiny_model, CharTokenizer(ALPHABET))


def test_the_same_seed_gives_the_same_text(model) -> None:
    texts = [model.generate("to be", 50, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 50


def test_stream_and_generate_give_the_same_text(model) -> None:
    assert "".join(model.stream("a", 40, seed=3)) == model.generate("a", 40, seed=3)


def test_no_new_tokens_give_no_text(tiny_model, device) -> None:
    model = LanguageModel(tiny_model.to(device), CharTokenizer(ALPHABET))
    assert model.generate("ab", 0) == "" and list(model.stream("ab", 0)) == []


def test_a_prompt_may_exceed_the_context(model) -> None:
    assert len(model.generate("word " * 30, 20, seed=0)) == 20


def test_a_context_shift_is_logged_once(tiny_model, messages) -> None:
    model = LanguageModel(tiny_model, CharTokenizer(ALPHABET))
    model.generate("to be", 11, seed=0)
    assert messages == []
    model.generate("to be", 60, seed=0)
    assert len(messages) == 1
    assert "16 tokens of context" in messages[0]


def test_a_batch_gives_the_completions_of_its_prompts_alone(model) -> None:
    prompts, seeds = ["", "a", "to be or not to be that is the question", "be"], [4, 3, 2, 1]
    completions = model.generate_batch(prompts, 30, seeds=seeds, stop=["q"], logprobs=True)
    for prompt, seed, completion in zip(prompts, seeds, completions, strict=True):
        assert completion.text == model.generate(prompt, 30, seed=seed, stop=["q"])
        assert completion.finish_reason == ("stop" if len(completion.ids) < 30 else "length")
        tokens = list(model.stream_tokens(prompt, len(completion.ids), seed=seed))
        assert [token.id for token in tokens] == completion.ids
        expected = [token.logprob for token in tokens]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_stop_token_ends_the_completion(model) -> None:
    [full] = model.generate_batch(["a"], 40, seeds=[5])
    stop = full.ids[7]
    [stopped] = model.generate_batch(["a"], 40, seeds=[5], stop_token_ids=[stop])
    end = full.ids.index(stop)
    assert stopped.ids == full.ids[: end + 1]
    assert stopped.text == full.text[:end]
    assert stopped.finish_reason == "stop"


def test_an_end_of_text_token_ends_every_kind_of_generation(tiny_model) -> None:
    tokenizer = CharTokenizer(ALPHABET)
    tokenizer.eot_token = 3
    model = LanguageModel(tiny_model, tokenizer)
    plain = LanguageModel(tiny_model, CharTokenizer(ALPHABET))
    seed = next(n for n in range(99) if ALPHABET[3] in plain.generate("a", 40, seed=n)[1:])
    expected = plain.generate("a", 40, seed=seed).split(ALPHABET[3])[0]
    assert model.generate("a", 40, seed=seed) == expected
    assert "".join(model.stream("a", 40, seed=seed)) == expected
    assert "".join(token.text for token in model.stream_tokens("a", 40, seed=seed)) == expected


def test_an_empty_prompt_is_a_line_break(model) -> None:
    assert model.generate("", 9, seed=0) == model.generate("\n", 9, seed=0)


def test_padding_rows_are_never_sampled(tiny_model) -> None:
    # The embedding has 64 rows, the alphabet 29: a higher id could not be decoded.
    with torch.no_grad():
        tiny_model.transformer["wte"].weight[29:] += 5
    text = LanguageModel(tiny_model, CharTokenizer(ALPHABET)).generate("a", 200, temperature=5)
    assert set(text) <= set(ALPHABET)


def test_temperature_0_is_greedy(model) -> None:
    text = model.generate("abc", 5, temperature=0)
    ids = model.encode("abc")
    for _ in range(5):
        ids.append(int(model.logits(ids)[-1].argmax()))
    assert text == model.decode(ids[3:])


def test_a_stream_never_splits_a_character(tiny_model) -> None:
    class TwoByteTokenizer(ByteTokenizer):
        vocab_size = 64

        def decode_bytes(self, ids):
            # Half of the ids are the first byte of é, half the second.
            return b"".join(b"\xc3" if i % 2 else b"\xa9" for i in ids)

    model = LanguageModel(tiny_model, TwoByteTokenizer())
    pieces = list(model.stream("\n", 60, seed=0, temperature=3))
    assert "é" in "".join(pieces)
    assert all(set(piece) <= {"é", "\ufffd"} for piece in pieces)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": -1},
     {"temperature": float("nan")}],
)  # fmt: skip
def test_an_argument_out_of_range_is_refused(model, options) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        model.generate("a", **options)


def test_logits_have_one_row_per_token(model) -> None:
    logits = model.logits(model.encode("hello"))
    assert logits.shape == (5, len(ALPHABET))
    assert logits.dtype == torch.float32
    with pytest.raises(UserError, match="1 to 16"):
        model.logits(list(range(17)))


@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3)))
def test_text_ends_before_the_first_stop_string(pieces, stop) -> None:
    expected = ""
    for char in "".join(pieces):
        expected += char
        if found := [text for text in stop if expected.endswith(text)]:
            expected = expected.removesuffix(max(found, key=len))
            break
    matcher, text = StopMatcher(stop), ""
    for piece in pieces:
        text += "" if matcher.is_stopped else matcher.add(piece)
    assert text + matcher.flush() == expected
