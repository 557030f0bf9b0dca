"""Ids are tiktoken's, whichever encoder is used and however the text is cut."""

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.tokenizers import fast_encode
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.fast_encode import FastEncoder, is_assigned
from gptforge.tokenizers.gpt2 import PATTERN, GPT2Tokenizer

GPT2 = GPT2Tokenizer()
FAST = FastEncoder(GPT2)
TIKTOKEN = tiktoken.Encoding(
    "gpt2", pat_str=PATTERN, mergeable_ranks=GPT2.ranks, special_tokens={END_OF_TEXT: 50256}
)

PIECES = [
    *("word", " word", "Word", "'s", "'ll", " '", "1", "1234", "٣", "½", "é", "e\u0301", "ß"),
    *("日本", "한", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0"),
    *("\u2028", "\u3000", "\0", "\x01", "\x7f", "\xad", "\u200b", "\u200d", "\ufeff", "\ufffd"),
    *("\U000e0001", "<|endoftext|>", "🙂", "👩\u200d🚀", "🇩🇪", "!", "!!", "...", "—", "$", "_"),
    *("\u0378", "\U0001fadf", "\ud800", "\udfff"),
]
# Characters that tokenizers often split differently.
piece_texts = st.lists(st.sampled_from(PIECES)).map("".join)


def reference(text: str) -> list[int]:
    return TIKTOKEN.encode_ordinary(text)


@settings(max_examples=1000)
@given(st.one_of(st.text(st.characters()), piece_texts))
def test_any_text(text) -> None:
    assert GPT2.encode(text).tolist() == FAST.encode(text).tolist() == reference(text)


@pytest.mark.parametrize("piece", ["a", "é", "日", "7", "🙂", "\n", "!", "Ab3", "\0"])
def test_long_text_without_spaces(piece) -> None:
    # Some encoders need quadratic time for this: many minutes.
    text = piece * (2**18 // len(piece))
    assert GPT2.encode(text).tolist() == FAST.encode(text).tolist() == reference(text)


@pytest.mark.parametrize("pieces", [PIECES, [piece for piece in PIECES if is_assigned(piece)]])
def test_long_mixed_text(pieces) -> None:
    rng = np.random.default_rng(0)
    text = "".join(pieces[i] for i in rng.integers(0, len(pieces), 200_000))
    assert len(text) > 2**18
    assert GPT2.encode(text).tolist() == FAST.encode(text).tolist() == reference(text)


def test_gigatoken_is_used_if_installed() -> None:
    pytest.importorskip("gigatoken")
    assert FAST._fast is not None


def test_wrong_fast_encoder_is_dropped(monkeypatch) -> None:
    def encode_wrong(text: str) -> np.ndarray:
        return np.array([ord(char) for char in text], np.uint32)

    monkeypatch.setattr(fast_encode, "_gigatoken", lambda tokenizer: encode_wrong)
    assert FastEncoder(GPT2)._fast is None

    def encode_hello_wrong(text: str) -> np.ndarray:
        return encode_wrong(text) if "hello" in text else np.array(reference(text), np.uint32)

    monkeypatch.setattr(fast_encode, "_gigatoken", lambda tokenizer: encode_hello_wrong)
    for text, is_kept in (("goodbye", True), ("hello", False)):
        encoder = FastEncoder(GPT2)
        assert encoder._fast is not None
        assert encoder.encode(text).tolist() == reference(text)
        assert (encoder._fast is not None) == is_kept


def test_fast_encoder_is_rebuilt_to_bound_memory(monkeypatch) -> None:
    built = []

    def build(tokenizer):
        built.append(1)
        return lambda text: np.array(reference(text), np.uint32)

    monkeypatch.setattr(fast_encode, "_gigatoken", build)
    monkeypatch.setattr(fast_encode, "MAX_CACHED_CHARS", 2000)
    encoder = FastEncoder(GPT2)
    for _ in range(100):
        assert encoder.encode("word " * 20).tolist() == reference("word " * 20)
    assert len(built) in (5, 6, 7)


def test_is_assigned() -> None:
    assert is_assigned("plain") and is_assigned("naïve 日本 🙂")
    assert not is_assigned("x\u0378")
    assert not is_assigned("x\ud800")


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer(" abcé", with_eot=True), ByteTokenizer(with_eot=True)]
)
def test_char_and_byte_encode_directly(tokenizer) -> None:
    encoder = FastEncoder(tokenizer)
    assert encoder._fast is None
    assert encoder.encode("cab é").tolist() == tokenizer.encode("cab é").tolist()
