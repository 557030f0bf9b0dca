import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data.prepare.split import (
    MIN_HASH_DOCUMENTS,
    DocumentStats,
    SplitRule,
    make_split_rule,
    text_digest,
)
from gptforge.errors import UserError


def seen(texts: list[str]) -> list[DocumentStats]:
    return [
        DocumentStats((number, 0), len(text), text_digest(text))
        for number, text in enumerate(texts)
    ]


def sides(texts: list[str], fraction: float) -> dict[str, str]:
    split = make_split_rule(seen(texts)[:MIN_HASH_DOCUMENTS], fraction)
    return {text: split.assign((i, 0), text_digest(text)) for i, text in enumerate(texts)}


@given(st.integers(2, 10_000), st.floats(0.001, 0.999))
def test_one_text_is_cut_where_the_contract_says(length, fraction) -> None:
    cut = int(length * (1 - fraction))
    if cut in (0, length):
        with pytest.raises(UserError, match="--val_fraction"):
            make_split_rule([DocumentStats((0, 0), length, 1)], fraction)
    else:
        split = make_split_rule([DocumentStats((0, 0), length, 1)], fraction)
        assert (split.rule, split.cut, split.prepend_eot) == ("character", cut, False)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=99), st.floats(0.001, 0.999))
def test_few_documents_are_cut_at_the_boundary_that_is_nearest(lengths, fraction) -> None:
    documents = [
        DocumentStats((number, 0), length, number) for number, length in enumerate(lengths)
    ]
    split = make_split_rule(documents, fraction)
    found = [split.assign(document.id, document.digest) for document in documents]
    first = found.index("val")
    # In order, and neither side is empty.
    assert first > 0
    assert found == ["train"] * first + ["val"] * (len(lengths) - first)
    wanted = sum(lengths) * (1 - fraction)
    distances = [abs(sum(lengths[:i]) - wanted) for i in range(1, len(lengths))]
    assert distances[first - 1] == min(distances)


@settings(deadline=None)
@given(
    st.integers(MIN_HASH_DOCUMENTS, 150),
    st.floats(0.0001, 0.9999),
    st.integers(0, 100),
    st.text(max_size=3),
)
def test_of_many_each_side_has_some_and_more_data_moves_none(n, fraction, more, salt) -> None:
    texts = [f"document {salt} {i}" for i in range(n)]
    before = sides(texts, fraction)
    assert {"train", "val"} == set(before.values())
    after = sides([*texts, *(f"another {salt} {i}" for i in range(more))], fraction)
    assert {text: after[text] for text in texts} == before


def test_of_many_about_the_share_that_was_asked_for_is_held_out() -> None:
    found = list(sides([f"document {i}" for i in range(5000)], 0.1).values())
    assert 400 < found.count("val") < 600


@given(st.lists(st.integers(0, 9), min_size=2, max_size=20), st.floats(0.001, 0.999))
def test_copies_of_one_of_a_few_documents_are_on_one_side(digests, fraction) -> None:
    documents = [DocumentStats((number, 0), 1, digest) for number, digest in enumerate(digests)]
    if len(set(digests)) == 1:
        assert make_split_rule(documents, fraction).exceptions == {}
        return
    assert make_split_rule(documents, fraction, split_duplicates=True).exceptions == {}
    split = make_split_rule(documents, fraction)
    found = {document.digest: set[str]() for document in documents}
    for document in documents:
        found[document.digest].add(split.assign(document.id, document.digest))
    assert all(len(sides) == 1 for sides in found.values())
    assert {"train"} in found.values()
    assert {"val"} in found.values()


def test_the_same_document_is_never_on_both_sides() -> None:
    split = make_split_rule(seen([f"document {i}" for i in range(100)]), 0.5)
    for i in range(100):
        digest = text_digest(f"document {i}")
        assert split.assign((0, i), digest) == split.assign((3, 7), digest)


def test_a_hundred_copies_of_one_document_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="all the same"):
        make_split_rule(seen(["same"] * 100), 0.1)
    assert make_split_rule(seen(["same"] * 100), 0.0).rule == "none"


def test_the_rule_is_plain_json() -> None:
    split = make_split_rule(seen([f"document {i}" for i in range(100)]), 0.0001)
    record = json.loads(json.dumps(split.to_json()))
    assert record["rule"] == "hash"
    assert list(record["exceptions"].values()) == ["val"]
    assert SplitRule(**record).assign((0, 0), 0) == split.assign((0, 0), 0)
