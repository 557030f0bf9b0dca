"""Ids are tiktoken's, whoever makes them and however the text is cut."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.tokenizers import fast_encode as bulk_module
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.fast_encode import FastEncoder, is_assigned
from gptforge.tokenizers.gpt2 import PATTERN, GPT2Tokenizer

GPT2 = GPT2Tokenizer()
BULK = FastEncoder(GPT2)
PLAIN = FastEncoder(GPT2, fast=False)
REFERENCE = tiktoken.Encoding(
    "gpt2", pat_str=PATTERN, mergeable_ranks=GPT2.ranks, special_tokens={END_OF_TEXT: 50256}
)

PIECES = [
    *(
        "word",
        " word",
        "Word",
        "'s",
        "'ll",
        " '",
        "1",
        "1234",
        "٣",
        "½",
        "é",
        "e\u0301",
        "ß",
        "日本",
        "한",
    ),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u2028",
        "\u3000",
    ),
    *(
        "\0",
        "\x01",
        "\x7f",
        "\xad",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\ufffd",
        "\U000e0001",
        "<|endoftext|>",
    ),
    *(
        "🙂",
        "👩\u200d🚀",
        "🇩🇪",
        "!",
        "!!",
        "...",
        "—",
        "$",
        "_",
        "\u0378",
        "\U0001fadf",
        "\ud800",
        "\udfff",
    ),
]


def reference(text: str) -> list[int]:
    return REFERENCE.encode_ordinary(text)


@settings(deadline=None, max_examples=500)
@given(st.text(st.characters()))
def test_any_text_at_all(text) -> None:
    assert GPT2.encode(text).tolist() == BULK.encode(text).tolist() == reference(text)


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_what_tokenizers_stumble_over(text) -> None:
    assert GPT2.encode(text).tolist() == BULK.encode(text).tolist() == reference(text)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from(PIECES)).map("".join), max_size=5))
def test_documents_stand_each_behind_a_mark(texts) -> None:
    expected = [i for text in texts for i in (50256, *reference(text))]
    assert BULK.encode_documents(texts).tolist() == expected
    assert PLAIN.encode_documents(texts).tolist() == expected


@pytest.mark.parametrize("piece", ["a", "é", "日", "7", "🙂", "\n", "!", "Ab3", "\0"])
def test_a_megabyte_without_a_space_is_encoded_whole(piece) -> None:
    # Some encoders take time that grows with the square of it: hours.
    text = piece * (2**20 // len(piece))
    assert GPT2.encode(text).tolist() == BULK.encode(text).tolist() == reference(text)


@pytest.mark.parametrize("pieces", [PIECES, [piece for piece in PIECES if is_assigned(piece)]])
def test_a_long_text_of_every_kind(pieces) -> None:
    dice = np.random.default_rng(0)
    text = "".join(pieces[i] for i in dice.integers(0, len(pieces), 800_000))
    assert len(text) > 2**20
    assert GPT2.encode(text).tolist() == BULK.encode(text).tolist() == reference(text)


def test_the_fast_encoder_is_used_where_it_is_installed() -> None:
    pytest.importorskip("gigatoken")
    assert (BULK.name, PLAIN.name) == ("gigatoken", "tiktoken")


def test_a_fast_encoder_that_errs_is_found_out_and_not_used_again(monkeypatch) -> None:
    def wrong(text: str) -> np.ndarray:
        return np.array([ord(char) for char in text], np.uint32)

    monkeypatch.setattr(bulk_module, "_gigatoken", lambda tokenizer: wrong)
    assert FastEncoder(GPT2).name == "tiktoken"

    def wrong_about_hello(text: str) -> np.ndarray:
        return wrong(text) if "hello" in text else np.array(reference(text), np.uint32)

    monkeypatch.setattr(bulk_module, "_gigatoken", lambda tokenizer: wrong_about_hello)
    encoder = FastEncoder(GPT2)
    assert encoder.name == "gigatoken"
    assert encoder.matches_reference("goodbye")
    assert not encoder.matches_reference("hello")
    assert encoder.name == "tiktoken"
    assert encoder.encode("hello").tolist() == reference("hello")


def test_the_fast_encoder_is_made_anew_now_and_then(monkeypatch) -> None:
    made = []

    def fast(tokenizer):
        made.append(1)
        return lambda text: np.array(reference(text), np.uint32)

    monkeypatch.setattr(bulk_module, "_gigatoken", fast)
    monkeypatch.setattr(bulk_module, "MAX_CACHED_CHARS", 2000)
    encoder = FastEncoder(GPT2)
    for _ in range(100):
        assert encoder.encode("word " * 20).tolist() == reference("word " * 20)
    # It would remember every word that it met, and grow with the data.
    assert len(made) in (5, 6, 7)


def test_characters_that_unicode_has_not_assigned_are_left_to_tiktoken() -> None:
    assert is_assigned("plain") and is_assigned("naïve 日本 🙂")
    assert not is_assigned("x\u0378")
    assert not is_assigned("x\ud800")


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(" abcé", marks=True), ByteTokenizer(marks=True)]
)
def test_characters_and_bytes_have_no_faster_way(tokenizer) -> None:
    encoder = FastEncoder(tokenizer)
    assert encoder.name == tokenizer.name
    assert encoder.encode("cab é").tolist() == tokenizer.encode("cab é").tolist()
    mark = tokenizer.eot_token
    assert encoder.encode_documents(["a", "b"]).tolist() == [
        mark,
        *tokenizer.encode("a"),
        mark,
        *tokenizer.encode("b"),
    ]
