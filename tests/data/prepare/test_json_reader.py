"""JSON arrays, and chats whose messages are joined."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare import text_io
from gptforge.data.prepare.json_reader import CHAT_NOTICE
from gptforge.data.prepare.readers import read_documents
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat
from tests.data.test_prepare import made, some_text, stream

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nYes?"}]
JOINED = "user: Hi\n\nassistant: Hello.\nYes?"


def texts(path: Path, skipped: BadInputHandler | None = None, **form) -> list[str]:
    (source,) = find_sources([str(path)])
    found = read_documents(source, TextFormat(**form), skipped or BadInputHandler(False))
    return [document.text for document in found]


@settings(deadline=None)
@given(
    st.lists(st.text(min_size=1).map(lambda text: text.replace("\0", "") + "x"), max_size=20),
    st.sampled_from([1, 5, 64, 2**15]),
    st.sampled_from([None, 2]),
)
def test_an_array_of_objects_is_read_as_its_lines_are(
    tmp_path_factory, found, block, indent
) -> None:
    folder = tmp_path_factory.mktemp("json")
    records = [{"n": [1, {"a": "]}"}], "text": text} for text in found]
    (folder / "a.json").write_text(f" \n{json.dumps(records, indent=indent)}\n", "utf-8")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_io, "BLOCK_BYTES", block)
        assert texts(folder / "a.json") == texts(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('[{"text": "a"}, {"text": ]', "element 2: not JSON"),
        ('[{"text": "a"}', "the array has no end"),
        ('[{"text": "a"} {"text": "b"}]', "behind element 1: not JSON: no comma"),
        ('[{"text": "a"}] {"text": "b"}', "text behind the array"),
        ('[{"text": "a"}, {"body": "b"}]', "element 2: no field 'text': it has body: choose"),
        ('["a", "b"]', "element 1: a string and no object: give objects with a field 'text'"),
        ('[{"text": "a"},]', "element 2: not JSON"),
        ("[" * 100_000, "element 1: not JSON"),
        ('{\n "data": [{"text": "a"}]\n}', "one object a line is read, or one array of objects"),
    ],
)
def test_what_is_no_array_of_objects_is_named(tmp_path, raw, words) -> None:
    (tmp_path / "a.json").write_text(raw)
    with pytest.raises(BadInputError, match=words):
        texts(tmp_path / "a.json")


def test_an_array_makes_the_same_shards_in_any_number_of_jobs(tmp_path) -> None:
    records = [{"text": some_text(i)} for i in range(150)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), "utf-8")
    one = made(tmp_path / "1", tmp_path / "a.json")
    many = made(tmp_path / "2", tmp_path / "a.json", shard_bytes=1000)
    assert stream(one, "train") == stream(many, "train")
    assert one.total("train", "documents") + one.total("val", "documents") == 150
    assert texts(tmp_path / "a.json") == [record["text"] for record in records]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "id": 1},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    ],
)
def test_a_chat_is_joined_by_role_and_content_and_it_is_said(tmp_path, record) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "c.json").write_text(json.dumps([record]))
    for name in ("c.jsonl", "c.json"):
        skipped = BadInputHandler(False)
        assert texts(tmp_path / name, skipped) == [JOINED]
        assert [CHAT_NOTICE in notice for notice in skipped.notices] == [True]
    assert any(
        CHAT_NOTICE in said
        for said in made(tmp_path / "o", tmp_path / "c.json", tokenizer="byte").record["notices"]
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        [{"text": "no role"}],
        ["a", "b"],
        [],
    ],
)
def test_a_chat_of_something_else_than_text_is_refused(tmp_path, messages) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "n": 1}))
    with pytest.raises(BadInputError, match="field 'messages' is a list, and no chat of texts"):
        texts(tmp_path / "c.jsonl")


def test_a_field_text_wins_and_a_field_asked_for_is_not_replaced_by_a_chat(tmp_path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT, "text": "a", "b": "c"}))
    assert texts(tmp_path / "c.jsonl") == ["a"]
    assert texts(tmp_path / "c.jsonl", field="messages") == [JOINED]
    with pytest.raises(BadInputError, match="no field 'x': it has messages, text, b: choose one"):
        texts(tmp_path / "c.jsonl", field="x")


def test_chats_and_categories_of_parquet_are_read(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": [1], "messages": [CHAT]}), tmp_path / "c.parquet")
    skipped = BadInputHandler(False)
    assert texts(tmp_path / "c.parquet", skipped) == [JOINED]
    assert any(CHAT_NOTICE in notice for notice in skipped.notices)
    labels = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": labels}), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == ["a", "b", "a"]
    pq.write_table(pa.table({"text": [[1]], "b": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(BadInputError, match=r"no text but of type list<.*it has b: choose"):
        texts(tmp_path / "e.parquet")
