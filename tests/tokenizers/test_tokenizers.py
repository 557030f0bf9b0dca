import base64
import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge import tokenizers
from gptforge.errors import UserError
from gptforge.tokenizers import byte_lengths, decode, from_name
from gptforge.tokenizers import gpt2 as gpt2_module
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer

anything = st.text(st.characters(exclude_categories=["Cs"]))
GPT2 = GPT2Tokenizer()


def test_the_ranks_are_those_that_tiktoken_publishes() -> None:
    ranks = GPT2.encoding._mergeable_ranks
    lines = [
        base64.b64encode(token) + b" " + str(rank).encode() + b"\n"
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    # SHA-256 of the file r50k_base.tiktoken.
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(b"".join(lines)).hexdigest() == published
    assert (GPT2.vocab_size, GPT2.eot_token) == (50257, 50256)


def test_known_ids() -> None:
    assert list(GPT2.encode("Hello world")) == [15496, 995]
    assert list(GPT2.encode("")) == []


@settings(deadline=None)
@given(anything)
def test_gpt2_gives_back_every_text(text: str) -> None:
    assert decode(GPT2, GPT2.encode(text)) == text


def test_the_end_of_text_mark_in_a_text_is_only_characters() -> None:
    ids = GPT2.encode("a<|endoftext|>b")
    assert GPT2.eot_token not in ids
    assert decode(GPT2, ids) == "a<|endoftext|>b"


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["\n", " ", "\n\n", "word", "?", "  ", "1 2", "é", "\t", "\r\n", "'s", "\x1c", "\u3000"]
        )
    )
)
def test_cutting_a_long_text_changes_no_id(pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = GPT2.encoding.encode_ordinary(text)
    saved, gpt2_module.CHUNK_CHARS = gpt2_module.CHUNK_CHARS, 3
    try:
        assert list(GPT2.encode(text)) == whole
    finally:
        gpt2_module.CHUNK_CHARS = saved


@settings(deadline=None)
@given(anything)
def test_char_and_byte_give_back_every_text(text: str) -> None:
    char, byte = CharTokenizer.from_text(text), ByteTokenizer()
    assert decode(char, char.encode(text)) == text
    assert decode(byte, byte.encode(text)) == text
    assert len(char.encode(text)) == len(text)
    assert byte.encode(text).tolist() == list(text.encode())


def test_a_character_that_was_never_seen_is_named() -> None:
    tokenizer = CharTokenizer.from_text("abc")
    for stranger in ("z", "A", "é", "\U0001f600"):
        with pytest.raises(UserError, match=repr(stranger)):
            tokenizer.encode(f"ab{stranger}c")


@pytest.mark.parametrize("name", ["gpt2", "char", "byte"])
def test_a_saved_tokenizer_is_the_same_one(tmp_path, name) -> None:
    text = "To be, or not to be: ça va? 日本\n"
    before = from_name(name, text)
    tokenizers.save(before, tmp_path / "tokenizer.json")
    for after in (
        tokenizers.load(tmp_path / "tokenizer.json"),
        from_name(str(tmp_path / "tokenizer.json"), "another text"),
    ):
        assert (after.name, after.vocab_size) == (before.name, before.vocab_size)
        np.testing.assert_array_equal(after.encode(text), before.encode(text))


@pytest.mark.parametrize("name", ["gpt2", "char", "byte"])
def test_byte_lengths_add_up_to_the_text(name) -> None:
    text = "Wherefore art thou — naïve? 日本\n" * 3
    tokenizer = from_name(name, text)
    assert byte_lengths(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())


OURS = '"format": "gptforge-tokenizer", "version": 1'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "Expecting value"),
        ("[]", "neither ours nor Hugging Face's form"),
        ("{}", "neither ours nor Hugging Face's form"),
        ('{"added_tokens": []}', "neither ours nor Hugging Face's form"),
        ('{"model": {"type": "BPE"}}', "only byte-level BPE"),
        ('{"format": "gptforge-tokenizer", "version": 2, "kind": "byte"}', "version 2 of our form"),
        (f'{{{OURS}, "kind": "wordpiece"}}', "its kind is 'wordpiece'"),
        (f'{{{OURS}, "kind": "char"}}', "'alphabet' is missing"),
        (
            f'{{{OURS}, "kind": "char", "alphabet": "ba"}}',
            "distinct characters in code point order",
        ),
        (f'{{{OURS}, "kind": "gpt2", "merges": ["\\u0001 x"]}}', "is not a BPE merge"),
        (f'{{{OURS}, "kind": "gpt2", "merges": ["a b", "a"]}}', "'a' is not a BPE merge"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_words(tmp_path, content, words) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(UserError, match=rf"own\.json: not a tokenizer .*{words}"):
        tokenizers.load(tmp_path / "own.json")


def test_a_byte_order_mark_in_front_of_a_tokenizer_does_no_harm(tmp_path) -> None:
    tokenizers.save(CharTokenizer("ab"), tmp_path / "t.json")
    marked = tmp_path / "marked.json"
    marked.write_text((tmp_path / "t.json").read_text(), encoding="utf-8-sig")
    assert tokenizers.load(marked).to_json() == CharTokenizer("ab").to_json()


def test_an_unknown_tokenizer_is_refused_with_the_names() -> None:
    with pytest.raises(UserError, match="gpt2, char or byte"):
        from_name("bert", "text")


def test_the_saved_form_is_plain_json(tmp_path) -> None:
    tokenizers.save(CharTokenizer("ab"), tmp_path / "tokenizer.json")
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (record["kind"], record["alphabet"]) == ("char", "ab")


@pytest.mark.parametrize(
    "made", [CharTokenizer("abc", with_eot=True), ByteTokenizer(with_eot=True)]
)
def test_a_mark_between_documents_is_an_id_that_no_text_becomes(made, tmp_path) -> None:
    plain = CharTokenizer("abc") if made.name == "char" else ByteTokenizer()
    assert (made.size, made.eot_token, plain.eot_token) == (
        plain.vocab_size + 1,
        plain.vocab_size,
        None,
    )
    np.testing.assert_array_equal(made.encode("abba"), plain.encode("abba"))
    assert decode(made, [*made.encode("ab"), made.eot_token]) == "ab<|endoftext|>"
    # It stands for no text, so it takes no part in bits per byte.
    assert byte_lengths(made)[made.eot_token] == 0
    tokenizers.save(made, tmp_path / "t.json")
    assert tokenizers.load(tmp_path / "t.json").to_json() == made.to_json() != plain.to_json()


def test_a_character_is_never_mistaken_for_the_mark() -> None:
    with pytest.raises(UserError, match="'d' is not in this model's alphabet"):
        CharTokenizer("abc", with_eot=True).encode("abcd")
