"""A vocabulary of the user's own: what transformers reads, and what we do without the trainer."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge import tokenizers
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, byte_lengths, decode
from gptforge.tokenizers.fast_encode import FastEncoder
from gptforge.tokenizers.hf_loader import (
    are_unambiguous,
    bpe,
    load_hf_tokenizer,
    unambiguous_merges,
)
from gptforge.tokenizers.train_bpe import train_bpe

pytest.importorskip("tokenizers")
SHAKESPEARE = (Path(__file__).parents[2] / "input.txt").read_text(encoding="utf-8")[:300_000]
OURS = train_bpe([SHAKESPEARE, "naïve café 日本語 🙂 " * 50], 1500)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(OURS)), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def test_it_has_the_size_that_was_asked_for_and_says_more_with_less() -> None:
    assert (OURS.vocab_size, OURS.eot_token, OURS.name) == (1500, 1499, "bpe")
    text = SHAKESPEARE[1000:3000]
    assert decode(OURS, OURS.encode(text)) == text
    assert len(OURS.encode(text)) < 0.5 * len(text)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
        st.lists(st.sampled_from(SHAKESPEARE[:9000].split(" "))).map(" ".join),
        st.lists(
            st.sampled_from(["thou", "'ll", "\n", "\n\n", "  ", "é", "日本", "🙂", "12", "?!"])
        ).map("".join),
    )
)
def test_transformers_gives_the_same_ids(theirs, text) -> None:
    # It would take the mark in a text for the mark between documents; we never do.
    expected = theirs(text.replace(END_OF_TEXT, ""), add_special_tokens=False)["input_ids"]
    assert OURS.encode(text.replace(END_OF_TEXT, "")).tolist() == expected
    assert FastEncoder(OURS).encode(text).tolist() == OURS.encode(text).tolist()


def test_the_file_and_our_own_form_both_bring_it_back(tmp_path) -> None:
    (tmp_path / "hf.json").write_text(json.dumps(tokenizer_json(OURS)))
    tokenizers.save(OURS, tmp_path / "own.json")
    for name in ("hf.json", "own.json"):
        back = tokenizers.from_name(str(tmp_path / name), "")
        assert back.to_json() == OURS.to_json()
        assert (back.name, back.vocab_size) == ("bpe", 1500)
    assert byte_lengths(OURS)[OURS.encode("naïve 日本")].sum() == len("naïve 日本".encode())


def test_gpt2s_own_file_is_gpt2() -> None:
    gpt2 = tokenizers.from_name("gpt2", "")
    assert load_hf_tokenizer(json.loads(json.dumps(tokenizer_json(gpt2)))).name == "gpt2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GPT-2's pattern"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "GPT-2's pattern"),
        ({"normalizer": {"type": "NFC"}}, "changes the text"),
        ({"added_tokens": [{"id": 0, "content": "<s>"}]}, "in this order"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "GPT-2's pattern"),
    ],
)
def test_a_tokenizer_that_works_otherwise_is_refused(tmp_path, change, words) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**tokenizer_json(OURS), **change}))
    with pytest.raises(UserError, match=words):
        tokenizers.load(tmp_path / "t.json")


def test_merges_that_programs_would_read_differently_are_left_out() -> None:
    # abc comes about in two ways: tokenizers looks for the pair, tiktoken for what it makes.
    assert unambiguous_merges(["a b", "b c", "ab c", "a bc"]) == ["a b", "b c", "ab c"]
    # bc is learned before ab, so ab never stands before c.
    assert unambiguous_merges(["b c", "a b", "ab c"]) == ["b c", "a b"]
    # What is built on such a merge goes with it.
    assert unambiguous_merges(["b c", "a b", "ab c", "abc d"]) == ["b c", "a b"]


@pytest.mark.parametrize("size", [0, 256, 2**21])
def test_a_size_out_of_reach_is_refused(size) -> None:
    with pytest.raises(UserError, match="--vocab_size must be from 257"):
        train_bpe(["text"], size)


def test_the_command_trains_on_files_and_training_takes_what_it_made(tmp_path, program) -> None:
    (tmp_path / "a.txt").write_text(SHAKESPEARE[:20_000])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": SHAKESPEARE[20_000:40_000]}))
    done = program(
        "tokenizer", "train", "a.txt", "b.jsonl", "--vocab_size", "400", "--out", "t/tok.json"
    )
    assert (done.code, done.err) == (0, "")
    again = program("tokenizer", "train", "a.txt", "--out", "t/tok.json")
    assert again.code == 2 and "is there already" in again.err
    flags = ("--preset", "debug", "--max_steps", 2, "--warmup_steps", 1, "--device", "cpu")
    assert (
        program("--input", "a.txt", "--tokenizer", "t/tok.json", "--out_dir", "run", *flags).code
        == 0
    )
    written = program("sample", "run", "--prompt", "ROMEO", "--max_new_tokens", 5)
    assert written.code == 0 and written.out.startswith("ROMEO")
    assert program("export", "run", "hf", "--to", "hf").code == 0
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = tokenizers.load(tmp_path / "t" / "tok.json")
    assert theirs(SHAKESPEARE[:500])["input_ids"] == own.encode(SHAKESPEARE[:500]).tolist()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "tokenizer train SRC"),
        (("encode", "x"), "tokenizer train SRC"),
        (("train", "--out", "t.json"), "name at least one file"),
        (("train", "nothing.txt", "--out", "t.json"), "no such file"),
        (("train", "empty.txt", "--out", "t.json"), "empty.txt: empty: there is no text to learn"),
        (("train", "bad.jsonl", "--out", "t.json", "--skip_bad"), "left out (1 x not JSON)"),
    ],
)
def test_mistakes_are_said_in_a_line(program, tmp_path, args, words) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text("not json")
    done = program("tokenizer", *args)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.splitlines()) == 1


class CountedRanks(dict):
    """Ranks that count how often one is looked up."""

    looked_up = 0

    def get(self, pair, default=None):
        self.looked_up += 1
        return super().get(pair, default)


def by_definition(text: str, ranks: dict[str, int]) -> list[str]:
    parts = list(text)
    while pairs := [
        (ranks[pair], place)
        for place in range(len(parts) - 1)
        if (pair := f"{parts[place]} {parts[place + 1]}") in ranks
    ]:
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


@settings(deadline=None, max_examples=200)
@given(
    choices=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=12),
    text=st.text("abc", max_size=40),
)
def test_a_text_is_spelled_as_bpe_defines_it(choices, text) -> None:
    tokens, merges = list("abc"), {}
    for left, right in choices:
        pair = tokens[left % len(tokens)], tokens[right % len(tokens)]
        merges.setdefault(" ".join(pair), len(merges))
        tokens.append("".join(pair))
    assert bpe(text, merges) == by_definition(text, merges)


def test_a_token_of_thousands_of_letters_takes_a_few_looks_for_each() -> None:
    merges = [f"{'a' * 2**k} {'a' * 2**k}" for k in range(13)]
    assert are_unambiguous(merges)
    ranks = CountedRanks({merge: rank for rank, merge in enumerate(merges)})
    assert bpe("a" * 2**13, ranks) == ["a" * 2**13]
    assert ranks.looked_up < 4 * 2**13


def test_merges_are_sound_if_none_is_left_out() -> None:
    for merges in (
        ["a b", "ab c"],
        ["a b", "b c", "a bc"],
        ["a b", "c d", "ab cd"],
        ["a a", "a a"],
    ):
        assert are_unambiguous(merges) == (unambiguous_merges(merges) == merges), merges
