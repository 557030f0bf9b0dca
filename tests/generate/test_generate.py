import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.inference.detokenizer import truncate_at_stop
from gptforge.inference.language_model import LanguageModel
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def writer(tiny_model) -> LanguageModel:
    return LanguageModel(tiny_model, CharTokenizer(ALPHABET))


def test_the_same_seed_writes_the_same_text(writer) -> None:
    texts = [writer.generate("to be", 50, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 50


def test_the_pieces_are_the_text(writer) -> None:
    assert "".join(writer.stream("a", 40, seed=3)) == writer.generate("a", 40, seed=3)


def test_a_prompt_longer_than_the_context_slides(writer) -> None:
    assert len(writer.generate("word " * 30, 20, seed=0)) == 20


def test_the_window_slides_aloud_and_says_so_once(tiny_model) -> None:
    said = []
    writer = LanguageModel(tiny_model, CharTokenizer(ALPHABET), log=said.append)
    writer.generate("to be", 11, seed=0)
    assert said == []
    writer.generate("to be", 60, seed=0)
    assert len(said) == 1
    assert "16 tokens of context" in said[0]


def test_a_batch_of_prompts_of_any_lengths_writes_what_each_alone_would(writer) -> None:
    prompts, seeds = ["", "a", "to be or not to be that is the question", "be"], [4, 3, 2, 1]
    together = writer.write(prompts, 30, seeds=seeds, stop=["q"], logprobs=True)
    for prompt, seed, writing in zip(prompts, seeds, together, strict=True):
        assert writing.text == writer.generate(prompt, 30, seed=seed, stop=["q"])
        assert writing.finish_reason == ("stop" if len(writing.ids) < 30 else "length")
        tokens = list(writer.tokens(prompt, len(writing.ids), seed=seed))
        assert [token.id for token in tokens] == writing.ids
        expected = [token.logprob for token in tokens]
        assert writing.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_stop_token_ends_it_and_stays_out_of_the_text(writer) -> None:
    [whole] = writer.write(["a"], 40, seeds=[5])
    stop = whole.ids[7]
    [ended] = writer.write(["a"], 40, seeds=[5], stop_ids=[stop])
    end = whole.ids.index(stop)
    assert ended.ids == whole.ids[: end + 1]
    assert ended.text == whole.text[:end]
    assert ended.finish_reason == "stop"


def test_an_end_of_text_mark_ends_every_way_of_writing(tiny_model) -> None:
    marked = CharTokenizer(ALPHABET)
    marked.eot_token = 3
    writer = LanguageModel(tiny_model, marked)
    plain = LanguageModel(tiny_model, CharTokenizer(ALPHABET))
    seed = next(n for n in range(99) if ALPHABET[3] in plain.generate("a", 40, seed=n)[1:])
    expected = plain.generate("a", 40, seed=seed).split(ALPHABET[3])[0]
    assert writer.generate("a", 40, seed=seed) == expected
    assert "".join(writer.stream("a", 40, seed=seed)) == expected
    assert "".join(token.text for token in writer.stream_tokens("a", 40, seed=seed)) == expected


def test_an_empty_prompt_starts_a_line(writer) -> None:
    assert writer.generate("", 9, seed=0) == writer.generate("\n", 9, seed=0)


def test_ids_without_a_token_are_never_written(tiny_model) -> None:
    # The table has 64 rows, the alphabet 29: an id behind it could not be decoded.
    with torch.no_grad():
        tiny_model.transformer["wte"].weight[29:] += 5
    text = LanguageModel(tiny_model, CharTokenizer(ALPHABET)).generate("a", 200, temperature=5)
    assert set(text) <= set(ALPHABET)


def test_greedy_takes_the_likeliest(writer) -> None:
    text = writer.generate("abc", 5, temperature=0)
    ids = writer.encode("abc")
    for _ in range(5):
        ids.append(int(writer.logits(ids)[-1].argmax()))
    assert text == writer.decode(ids[3:])


def test_a_character_is_never_cut_in_a_stream(tiny_model) -> None:
    class Wide(ByteTokenizer):
        vocab_size = 64

        def decode_bytes(self, ids):
            # Half of the ids are the first byte of é, half the second.
            return b"".join(b"\xc3" if i % 2 else b"\xa9" for i in ids)

    pieces = list(LanguageModel(tiny_model, Wide()).stream("\n", 60, seed=0, temperature=3))
    assert "é" in "".join(pieces)
    assert all(set(piece) <= {"é", "\ufffd"} for piece in pieces)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": -1},
     {"temperature": float("nan")}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(writer, options) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        writer.generate("a", **options)


def test_logits_are_one_row_a_token(writer) -> None:
    logits = writer.logits(writer.encode("hello"))
    assert logits.shape == (5, len(ALPHABET))
    assert logits.dtype == torch.float32
    with pytest.raises(UserError, match="1 to 16"):
        writer.logits(list(range(17)))


@settings(deadline=None)
@given(st.lists(st.text("ab", max_size=3)), st.lists(st.text("ab", min_size=1, max_size=3)))
def test_writing_ends_before_the_first_stop_text(pieces, stop) -> None:
    whole = "".join(pieces)
    expected = ""
    for char in whole:
        expected += char
        if found := [text for text in stop if expected.endswith(text)]:
            expected = expected.removesuffix(max(found, key=len))
            break
    assert "".join(truncate_at_stop(iter(pieces), stop)) == expected
