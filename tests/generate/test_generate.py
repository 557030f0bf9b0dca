import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.generate.language_model import LanguageModel
from gptforge.generate.streaming import until
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
        ids.append(int(writer.logits(ids)[-1, : len(ALPHABET)].argmax()))
    assert text == writer.decode(ids[3:])


def test_a_character_is_never_cut_in_a_stream(tiny_model) -> None:
    class Wide(ByteTokenizer):
        size = 64

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
    assert logits.shape == (5, 64)
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
    assert "".join(until(iter(pieces), stop)) == expected
