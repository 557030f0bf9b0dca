"""Which documents are held out, by the rule and by the names of the files."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.prepare.split import (
    MIN_HASH_DOCUMENTS,
    DocumentStats,
    make_split_rule,
    split_by_name,
    text_digest,
)
from gptforge.errors import UserError


def stats(texts: list[str]) -> list[DocumentStats]:
    return [DocumentStats((i, 0), len(text), text_digest(text)) for i, text in enumerate(texts)]


def splits(texts: list[str], fraction: float) -> dict[str, str]:
    rule = make_split_rule(stats(texts)[:MIN_HASH_DOCUMENTS], fraction)
    return {text: rule.assign((i, 0), text_digest(text)) for i, text in enumerate(texts)}


@given(st.integers(2, 10_000), st.floats(0.001, 0.999))
def test_single_text_is_cut_at_a_character(length, fraction) -> None:
    cut = int(length * (1 - fraction))
    if cut in (0, length):
        with pytest.raises(UserError, match="--val_fraction"):
            make_split_rule([DocumentStats((0, 0), length, 1)], fraction)
    else:
        rule = make_split_rule([DocumentStats((0, 0), length, 1)], fraction)
        assert (rule.rule, rule.cut, rule.prepend_eot) == ("character", cut, False)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=99), st.floats(0.001, 0.999))
def test_few_documents_are_split_at_the_nearest_boundary(lengths, fraction) -> None:
    documents = [DocumentStats((i, 0), length, i) for i, length in enumerate(lengths)]
    rule = make_split_rule(documents, fraction)
    names = [rule.assign(document.id, document.digest) for document in documents]
    first = names.index("val")
    # In order, and no split is empty.
    assert first > 0
    assert names == ["train"] * first + ["val"] * (len(lengths) - first)
    target = sum(lengths) * (1 - fraction)
    distances = [abs(sum(lengths[:i]) - target) for i in range(1, len(lengths))]
    assert distances[first - 1] == min(distances)


@given(
    st.integers(MIN_HASH_DOCUMENTS, 150),
    st.floats(0.0001, 0.9999),
    st.integers(0, 100),
    st.text(max_size=3),
)
def test_hash_leaves_no_split_empty_and_more_data_moves_none(n, fraction, more, salt) -> None:
    texts = [f"document {salt} {i}" for i in range(n)]
    before = splits(texts, fraction)
    assert {"train", "val"} == set(before.values())
    after = splits([*texts, *(f"another {salt} {i}" for i in range(more))], fraction)
    assert {text: after[text] for text in texts} == before


def test_hash_holds_out_about_the_requested_share() -> None:
    names = list(splits([f"document {i}" for i in range(5000)], 0.1).values())
    assert 400 < names.count("val") < 600


@given(st.lists(st.integers(0, 9), min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_copies_of_few_documents_are_in_one_split(digests, fraction) -> None:
    documents = [DocumentStats((i, 0), 1, digest) for i, digest in enumerate(digests)]
    if len(set(digests)) == 1:
        assert make_split_rule(documents, fraction).exceptions == {}
        return
    assert make_split_rule(documents, fraction, split_duplicates=True).exceptions == {}
    rule = make_split_rule(documents, fraction)
    by_digest = {document.digest: set[str]() for document in documents}
    for document in documents:
        by_digest[document.digest].add(rule.assign(document.id, document.digest))
    assert all(len(names) == 1 for names in by_digest.values())
    assert {"train"} in by_digest.values()
    assert {"val"} in by_digest.values()


def test_hash_keeps_copies_in_one_split() -> None:
    rule = make_split_rule(stats([f"document {i}" for i in range(100)]), 0.5)
    for i in range(100):
        digest = text_digest(f"document {i}")
        assert rule.assign((0, i), digest) == rule.assign((3, 7), digest)


def test_hundred_copies_of_one_document_are_refused() -> None:
    with pytest.raises(UserError, match="all the same"):
        make_split_rule(stats(["same"] * 100), 0.1)
    assert make_split_rule(stats(["same"] * 100), 0.0).rule == "none"


def test_record_of_the_rule_keeps_its_keys() -> None:
    rule = make_split_rule(stats([f"document {i}" for i in range(100)]), 0.0001)
    record = json.loads(json.dumps(rule.to_json()))
    assert record["rule"] == "hash"
    assert list(record["exceptions"].values()) == ["val"]
    assert record == {
        "rule": "hash",
        "fraction": 0.0001,
        "cut": 0,
        "first": [0, 0],
        "exceptions": dict(rule.exceptions),
        "held_out": [],
        "marks": True,
    }


@pytest.mark.parametrize(
    ("names", "val", "test"),
    [
        (["train.txt", "valid.txt", "test.txt"], [1], [2]),
        (["train/a.txt", "validation/b.txt", "test/c.txt", "train/d.txt"], [1], [2]),
        (["d-train-00000-of-00002.parquet", "d-validation-00000-of-00001.parquet"], [1], []),
        (["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"], [1], []),
        (["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"], [1], [2]),
        (["Train.jsonl.gz", "VAL_2.jsonl.gz"], [1], []),
        (["en/train.txt", "en/dev.txt", "fr/train.txt", "fr/dev.txt", "notes.txt"], [1, 3], []),
        (["train/a.txt", "train/val_1.txt", "train/b.txt", "val/train_1.txt"], [1], []),
        (["training/a.txt", "dev/b.txt"], [1], []),
        # Words only, and only if a name says train.
        (["train_0.txt", "medieval_0.txt", "development_notes.txt", "contest.txt"], [], []),
        (["restrain.txt", "valid.txt"], [], []),
        (["a.txt", "dev_notes.txt", "test.txt"], [], []),
        (["train.txt", "train_test.txt"], [], []),
        (["val.txt"], [], []),
    ],
)
def test_names_say_which_files_are_held_out_or_ignored(names, val, test) -> None:
    words = split_by_name([Path("/any/dev/test", name) for name in names])
    assert [i for i, word in enumerate(words) if word == "val"] == val
    assert [i for i, word in enumerate(words) if word == "test"] == test


def test_folders_above_all_files_say_nothing() -> None:
    for name in ("a.txt", "train.txt"):
        paths = [Path("x/train/val", name), Path("x/train/val/b.txt")]
        assert not {"val", "test"} & set(split_by_name(paths))
