"""A BPE of one's own, trained, saved, exported, and the algorithm behind it."""

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge import tokenizers
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, byte_lengths, decode
from gptforge.tokenizers.fast_encode import FastEncoder
from gptforge.tokenizers.hf_bpe import parse_tokenizer_json, train_bpe, unambiguous_merges

pytest.importorskip("tokenizers")
SHAKESPEARE = (Path(__file__).parents[2] / "input.txt").read_text(encoding="utf-8")[:300_000]
TRAINED = train_bpe([SHAKESPEARE, "naïve café 日本語 🙂 " * 50], 1500)
FAST = FastEncoder(TRAINED)


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(TRAINED)), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


def test_vocab_size_and_compression() -> None:
    assert (TRAINED.vocab_size, TRAINED.eot_token, TRAINED.name) == (1500, 1499, "bpe")
    text = SHAKESPEARE[1000:3000]
    assert decode(TRAINED, TRAINED.encode(text)) == text
    assert len(TRAINED.encode(text)) < 0.5 * len(text)


def test_a_text_without_spaces_takes_linear_time() -> None:
    """Uncut, these would take 40 times as long as the words below, and a megabyte a day."""
    letters = "".join(random.Random(1).choices("ACGT", k=60_000))
    start = time.process_time()
    words = train_bpe([letters[i : i + 6] for i in range(0, len(letters), 6)], 320)
    short = time.process_time() - start
    start = time.process_time()
    tokenizer = train_bpe([letters], 320)
    assert time.process_time() - start < 10 * short + 1
    assert tokenizer.vocab_size == words.vocab_size
    assert decode(tokenizer, tokenizer.encode(letters)) == letters


@settings(max_examples=300)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40),
        st.lists(st.sampled_from(SHAKESPEARE[:9000].split(" "))).map(" ".join),
        st.lists(
            st.sampled_from(["thou", "'ll", "\n", "\n\n", "  ", "é", "日本", "🙂", "12", "?!"])
        ).map("".join),
    )
)
def test_transformers_gives_the_same_ids(hf_tokenizer, text) -> None:
    # transformers encodes <|endoftext|> in a text as the special token.
    text = text.replace(END_OF_TEXT, "")
    expected = hf_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert TRAINED.encode(text).tolist() == expected
    assert FAST.encode(text).tolist() == expected


def test_load_from_both_formats(tmp_path) -> None:
    (tmp_path / "hf.json").write_text(json.dumps(tokenizer_json(TRAINED)))
    tokenizers.save(TRAINED, tmp_path / "own.json")
    for name in ("hf.json", "own.json"):
        loaded = tokenizers.from_name(str(tmp_path / name), "")
        assert loaded.to_json() == TRAINED.to_json()
        assert (loaded.name, loaded.vocab_size) == ("bpe", 1500)
    text = "naïve 日本"
    assert byte_lengths(TRAINED)[TRAINED.encode(text)].sum() == len(text.encode())


def test_gpt2_from_hugging_face_is_gpt2() -> None:
    gpt2 = tokenizers.from_name("gpt2", "")
    assert parse_tokenizer_json(json.loads(json.dumps(tokenizer_json(gpt2)))).name == "gpt2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GPT-2's pattern"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "GPT-2's pattern"),
        ({"normalizer": {"type": "NFC"}}, "changing the text"),
        ({"added_tokens": [{"id": 0, "content": "<s>"}]}, "in this order"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "GPT-2's pattern"),
    ],
)
def test_unsupported_hf_tokenizer(tmp_path, change, words) -> None:
    (tmp_path / "t.json").write_text(json.dumps({**tokenizer_json(TRAINED), **change}))
    with pytest.raises(UserError, match=words):
        tokenizers.load(tmp_path / "t.json")


@pytest.mark.parametrize("vocab_size", [0, 256, 2**21])
def test_vocab_size_out_of_range(vocab_size) -> None:
    with pytest.raises(UserError, match="--vocab_size must be from 257"):
        train_bpe(["text"], vocab_size)


def test_train_then_use_in_training_and_export(tmp_path, program) -> None:
    (tmp_path / "a.txt").write_text(SHAKESPEARE[:20_000])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": SHAKESPEARE[20_000:40_000]}))
    train = ("tokenizer", "train", "a.txt", "b.jsonl", "--out", "t/tok.json")
    done = program(*train, "--vocab_size", "400")
    assert (done.code, done.err) == (0, "")
    again = program(*train)
    assert again.code == 2 and "t/tok.json" in again.err
    flags = ("--preset", "debug", "--max_steps", 2, "--warmup_steps", 1, "--device", "cpu")
    flags += ("--input", "a.txt", "--tokenizer", "t/tok.json", "--out_dir", "run")
    assert program(*flags).code == 0
    sample = program("sample", "run", "--prompt", "ROMEO", "--max_new_tokens", 5)
    assert sample.code == 0 and sample.out.startswith("ROMEO")
    assert program("export", "run", "hf", "--to", "hf").code == 0
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    trained = tokenizers.load(tmp_path / "t" / "tok.json")
    assert exported(SHAKESPEARE[:500])["input_ids"] == trained.encode(SHAKESPEARE[:500]).tolist()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "tokenizer train SRC"),
        (("encode", "x"), "tokenizer train SRC"),
        (("train", "--out", "t.json"), "name at least one file"),
        (("train", "nothing.txt", "--out", "t.json"), "no such file"),
        (
            ("train", "empty.txt", "--out", "t.json"),
            "empty.txt: there is no text in it",
        ),
        (("train", "bad.jsonl", "--out", "t.json", "--skip_bad"), "(1 x not JSON)"),
    ],
)
def test_usage_errors_are_one_line(program, tmp_path, args, words) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text("not json")
    done = program("tokenizer", *args)
    assert done.code == 2
    assert words in done.err
    assert len(done.err.splitlines()) == 1


def test_a_long_token_takes_linear_time() -> None:
    merges = [f"{'a' * 2**k} {'a' * 2**k}" for k in range(18)]
    start = time.process_time()
    assert unambiguous_merges(merges) == merges
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("merges", "kept"),
    [
        (["a b", "ab c"], ["a b", "ab c"]),
        (["a b", "c d", "ab cd"], ["a b", "c d", "ab cd"]),
        (["a a", "a a"], ["a a"]),
        # abc has two merges: tokenizers ranks the pairs, tiktoken the tokens.
        (["a b", "b c", "ab c", "a bc"], ["a b", "b c", "ab c"]),
        # bc has the lower rank, so ab is never followed by c.
        (["b c", "a b", "ab c"], ["b c", "a b"]),
        (["a b", "b c", "a bc"], ["a b", "b c"]),
        # Merges of a dropped token are dropped.
        (["b c", "a b", "ab c", "abc d"], ["b c", "a b"]),
    ],
)
def test_ambiguous_merges_are_dropped(merges, kept) -> None:
    assert unambiguous_merges(merges) == kept
