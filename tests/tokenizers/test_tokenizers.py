import base64
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge import tokenizers
from gptforge.errors import UserError
from gptforge.tokenizers import from_name
from gptforge.tokenizers.base import byte_lengths, char_lengths, decode
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer

valid_text = st.text(st.characters(exclude_categories=["Cs"]))
GPT2 = GPT2Tokenizer()


def test_ranks_are_tiktokens() -> None:
    ranks = GPT2.encoding._mergeable_ranks
    lines = [
        base64.b64encode(token) + b" " + str(rank).encode() + b"\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    # SHA-256 of r50k_base.tiktoken.
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(b"".join(lines)).hexdigest() == published
    assert (GPT2.vocab_size, GPT2.eot_token) == (50257, 50256)


def test_known_ids() -> None:
    assert list(GPT2.encode("Hello world")) == [15496, 995]
    assert list(GPT2.encode("")) == []


@given(valid_text)
def test_gpt2_round_trip(text: str) -> None:
    assert decode(GPT2, GPT2.encode(text)) == text


def test_eot_in_a_text_is_ordinary_characters() -> None:
    ids = GPT2.encode("a<|endoftext|>b")
    assert GPT2.eot_token not in ids
    assert decode(GPT2, ids) == "a<|endoftext|>b"


@given(valid_text)
def test_char_and_byte_round_trip(text: str) -> None:
    char, byte = CharTokenizer.from_text(text), ByteTokenizer()
    assert decode(char, char.encode(text)) == text
    assert decode(byte, byte.encode(text)) == text
    assert len(char.encode(text)) == len(text)
    assert byte.encode(text).tolist() == list(text.encode())


@pytest.mark.parametrize("char", ["z", "A", "é", "\U0001f600"])
def test_unknown_character_is_named(char) -> None:
    with pytest.raises(UserError, match=repr(char)):
        CharTokenizer.from_text("abc").encode(f"ab{char}c")


@pytest.mark.parametrize("name", ["gpt2", "char", "byte"])
def test_save_and_load(tmp_path, name) -> None:
    text = "To be, or not to be: ça va? 日本\n"
    saved = from_name(name, text)
    tokenizers.save(saved, tmp_path / "tokenizer.json")
    for loaded in (
        tokenizers.load(tmp_path / "tokenizer.json"),
        from_name(str(tmp_path / "tokenizer.json"), "another text"),
    ):
        assert (loaded.name, loaded.vocab_size) == (saved.name, saved.vocab_size)
        np.testing.assert_array_equal(loaded.encode(text), saved.encode(text))


@pytest.mark.parametrize("name", ["gpt2", "char", "byte"])
def test_byte_and_char_lengths_sum_to_the_text(name) -> None:
    text = "Wherefore art thou — naïve? 日本\n" * 3
    tokenizer = from_name(name, text)
    assert byte_lengths(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())
    assert char_lengths(tokenizer)[tokenizer.encode(text)].sum() == len(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "neither GPT-Forge's nor Hugging Face's format"),
        ('{"added_tokens": []}', "neither GPT-Forge's nor Hugging Face's format"),
        ('{"model": {"type": "BPE"}}', "only byte-level BPE"),
        ('{"format": "gptforge-tokenizer", "version": 2, "kind": "byte"}', "version 2, not 1"),
    ],
)
def test_invalid_file(tmp_path, content, words) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(UserError, match=rf"own\.json: not a tokenizer .*{words}"):
        tokenizers.load(tmp_path / "own.json")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kind": "wordpiece"}, "unknown kind 'wordpiece'"),
        ({"kind": "char"}, "'alphabet' is missing"),
        ({"kind": "char", "alphabet": "ba"}, "distinct characters in code point order"),
        ({"kind": "gpt2", "merges": ["\u0001 x"]}, "is not a BPE merge"),
        ({"kind": "gpt2", "merges": ["a b", "a"]}, "'a' is not a BPE merge"),
    ],
)
def test_invalid_tokenizer(tmp_path, record, words) -> None:
    record = {"format": "gptforge-tokenizer", "version": 1, **record}
    test_invalid_file(tmp_path, json.dumps(record), words)


def test_byte_order_mark_is_ignored(tmp_path) -> None:
    tokenizers.save(CharTokenizer("ab"), tmp_path / "t.json")
    with_bom = tmp_path / "bom.json"
    with_bom.write_text((tmp_path / "t.json").read_text(), encoding="utf-8-sig")
    assert tokenizers.load(with_bom).to_json() == CharTokenizer("ab").to_json()


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="gpt2, char, byte or bpe"):
        from_name("bert", "text")


def test_file_format(tmp_path) -> None:
    # Files of earlier versions must load: these keys never change.
    tokenizers.save(CharTokenizer("ab", with_eot=True), tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {
        "format": "gptforge-tokenizer",
        "version": 1,
        "kind": "char",
        "alphabet": "ab",
        "marks": True,
        "marks_documents": True,
    }


@pytest.mark.parametrize(
    ("tokenizer", "plain"),
    [
        (CharTokenizer("abc", with_eot=True), CharTokenizer("abc")),
        (ByteTokenizer(with_eot=True), ByteTokenizer()),
    ],
)
def test_eot_token_is_the_last_id(tokenizer, plain, tmp_path) -> None:
    eot = tokenizer.eot_token
    assert (tokenizer.vocab_size, eot) == (plain.vocab_size + 1, plain.vocab_size)
    assert plain.eot_token is None
    np.testing.assert_array_equal(tokenizer.encode("abba"), plain.encode("abba"))
    assert decode(tokenizer, [*tokenizer.encode("ab"), eot]) == "ab<|endoftext|>"
    # It is no text, so it does not count in bits per byte.
    assert byte_lengths(tokenizer)[eot] == char_lengths(tokenizer)[eot] == 0
    tokenizers.save(tokenizer, tmp_path / "t.json")
    assert tokenizers.load(tmp_path / "t.json").to_json() == tokenizer.to_json() != plain.to_json()


def test_unknown_character_is_not_encoded_as_eot() -> None:
    with pytest.raises(UserError, match="'d' is not in this model's alphabet"):
        CharTokenizer("abc", with_eot=True).encode("abcd")
