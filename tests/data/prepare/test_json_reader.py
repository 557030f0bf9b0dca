"""JSON arrays, and chats whose messages are joined."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare import text_io
from gptforge.data.prepare.json_reader import CHAT_NOTICE
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.scan import iter_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import Index
from gptforge.data.token_dataset import ShardDataset

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.\nYes?"}]
JOINED = "user: Hi\n\nassistant: Hello.\nYes?"


def read_texts(path: Path, bad_input: BadInputHandler | None = None, **options) -> list[str]:
    (source,) = find_sources([str(path)])
    bad_input = bad_input or BadInputHandler(skip=False)
    return list(iter_text(source, TextFormat(**options), bad_input))


def run_prepare(out: Path, path: Path, **options) -> Index:
    return prepare(out, PrepareRequest((str(path),), tokenizer="byte", **options), num_workers=1)


@given(
    st.lists(st.text(min_size=1).map(lambda text: text.replace("\0", "") + "x"), max_size=20),
    st.sampled_from([1, 5, 64, 2**15]),
    st.sampled_from([None, 2]),
)
def test_array_is_read_like_lines(tmp_path_factory, texts, block, indent) -> None:
    folder = tmp_path_factory.mktemp("json")
    records = [{"n": [1, {"a": "]}"}], "text": text} for text in texts]
    (folder / "a.json").write_text(f" \n{json.dumps(records, indent=indent)}\n", "utf-8")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_io, "BLOCK_BYTES", block)
        assert read_texts(folder / "a.json") == read_texts(folder / "a.jsonl")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('[{"text": "a"}, {"text": ]', "element 2: not JSON"),
        ('[{"text": "a"}', "the array has no end"),
        ('[{"text": "a"} {"text": "b"}]', "after element 1: not JSON: no comma"),
        ('[{"text": "a"}] {"text": "b"}', "text after the array"),
        ('[{"text": "a"}, {"body": "b"}]', "element 2: no field 'text': other objects have it"),
        ('["a", "b"]', "element 1: a string, not an object: give objects with a field 'text'"),
        ('[{"text": "a"},]', "element 2: not JSON"),
        ("[" * 100_000, "element 1: not JSON"),
        ('{\n "data": [{"text": "a"}]\n}', "one object a line is read, or one array of objects"),
    ],
)
def test_bad_array(tmp_path, raw, words) -> None:
    (tmp_path / "a.json").write_text(raw)
    with pytest.raises(BadInputError, match=words):
        read_texts(tmp_path / "a.json")


def test_array_gives_the_same_tokens_in_any_number_of_jobs(tmp_path) -> None:
    texts = [f"document {i}: " + "words " * (i % 7) + "end" for i in range(150)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text} for text in texts], indent=1), "utf-8")
    assert read_texts(path) == texts
    tokens = []
    for shard_bytes in (2**26, 1000):
        index = run_prepare(tmp_path / f"{shard_bytes}", path, shard_bytes=shard_bytes)
        assert index.total("train", "documents") + index.total("val", "documents") == 150
        tokens.append(ShardDataset(index.shards("train"), vocab_size=257)[:].tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT, "id": 1},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]},
        {"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    ],
)
def test_messages_of_a_chat_are_joined_with_a_notice(tmp_path, record) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "c.json").write_text(json.dumps([record]))
    for name in ("c.jsonl", "c.json"):
        bad_input = BadInputHandler(skip=False)
        assert read_texts(tmp_path / name, bad_input) == [JOINED]
        assert [CHAT_NOTICE in notice for notice in bad_input.notices] == [True]
    notices = run_prepare(tmp_path / "o", tmp_path / "c.json").record["notices"]
    assert any(CHAT_NOTICE in notice for notice in notices)


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
def test_chat_with_more_than_text_is_refused(tmp_path, messages) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "n": 1}))
    with pytest.raises(BadInputError, match="field 'messages' is a list, but not a chat of texts"):
        read_texts(tmp_path / "c.jsonl")


def test_text_field_has_priority_over_a_chat(tmp_path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT, "text": "a", "b": "c"}))
    assert read_texts(tmp_path / "c.jsonl") == ["a"]
    assert read_texts(tmp_path / "c.jsonl", field="messages") == [JOINED]
    with pytest.raises(BadInputError, match="no field 'x': it has messages, text, b: choose one"):
        read_texts(tmp_path / "c.jsonl", field="x")


def test_chats_and_categories_in_parquet(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": [1], "messages": [CHAT]}), tmp_path / "c.parquet")
    bad_input = BadInputHandler(skip=False)
    assert read_texts(tmp_path / "c.parquet", bad_input) == [JOINED]
    assert any(CHAT_NOTICE in notice for notice in bad_input.notices)
    labels = pa.array(["a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": labels}), tmp_path / "d.parquet")
    assert read_texts(tmp_path / "d.parquet") == ["a", "b", "a"]
    pq.write_table(pa.table({"text": [[1]], "b": ["x"]}), tmp_path / "e.parquet")
    with pytest.raises(BadInputError, match=r"not text but of type list<.*it has b: choose"):
        read_texts(tmp_path / "e.parquet")
