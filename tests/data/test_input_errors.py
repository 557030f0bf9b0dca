"""Bad input: one line that names the file and the place, or skipped and counted; no traceback."""

import copy
import errno
import gzip
import json
import lzma
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptforge import files
from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare import readers, table_reader, text_io
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.readers import read_documents
from gptforge.data.prepare.request import PrepareRequest, select_files
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.table_reader import MAX_BATCH_BYTES, rows_per_batch
from gptforge.data.prepare.text_io import InputPart, TextFormat
from gptforge.data.shard_index import Index
from gptforge.data.token_dataset import ShardWriter
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.char import CharTokenizer
from tests.data.prepare.small_datasets import write_parquet

GOOD = json.dumps({"text": "Wherefore art thou Romeo?"})
SPLITS = ("train", "val")


def run_prepare(tmp_path: Path, *names: str, **options) -> Index:
    request = PrepareRequest(tuple(str(tmp_path / name) for name in names), **options)
    return prepare(tmp_path / "out", request, num_workers=1)


def expect_error(tmp_path: Path, words: str, *names: str, **options) -> None:
    with pytest.raises(UserError, match=words):
        run_prepare(tmp_path, *names, **options)
    # No output that looks complete is left behind.
    assert not (tmp_path / "out").exists()


def count_documents(index: Index) -> int:
    return sum(index.total(split, "documents") for split in SPLITS)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "there is no text in it"),
        (b" \n\t\n", "there is no text in it"),
        (b"caf\xe9 au lait", r"bad.txt: not utf-8: byte 0xe9 at offset 3: .*--encoding latin-1"),
        (b"a" * 5000 + b"\xff", "byte 0xff at offset 5000"),
        (b"\xff\xfeb\0", "NUL bytes as well: this is a binary file"),
        (b"\xe6\x97", "byte 0xe6 at offset 0"),
        (b"PNG\0\0data", "NUL byte at offset 3: this is a binary file"),
        (b"\xef\xbb\xbfab\0", "NUL byte at offset 5"),
        ("text".encode("utf-16-le"), "NUL byte at offset 1"),
        (b"PK\3\4\x14\0\x93", "bad.txt: a ZIP archive, .*, not text: extract the text"),
        (b"BZh91AY&SY\xfb", "bad.txt: a bzip2 file, not text"),
        (b"\x1f\x8b\x08\0\0", "bad.txt: a .gz file, not text: extract the text"),
        (b"name".ljust(257, b"\0") + b"ustar", "bad.txt: a tar archive, not text"),
    ],
)
def test_binary_file(tmp_path, raw, words) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    expect_error(tmp_path, words, "bad.txt")


def test_offsets_after_the_first_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(text_io, "BLOCK_BYTES", 7)
    text = "日本\r\nnaïve ".encode() * 5
    (tmp_path / "bad.txt").write_bytes(text + b"\xff")
    expect_error(tmp_path, f"byte 0xff at offset {len(text)}", "bad.txt")
    (tmp_path / "bad.txt").write_bytes(text + b"\0")
    expect_error(tmp_path, f"NUL byte at offset {len(text)}", "bad.txt")


def test_explicit_encoding(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(("caf\xe9 au lait\r\n" * 9).encode("latin-1"))
    index = run_prepare(tmp_path, "t.txt", text_format=TextFormat(encoding="latin-1"))
    assert index.total("train", "bytes") > index.total("train", "characters")
    for encoding in ("klingon", "hex", "undefined"):
        with pytest.raises(UserError, match=f"{encoding}: there is no such encoding"):
            TextFormat(encoding=encoding)


@pytest.mark.parametrize(
    ("encoding", "raw", "words"),
    [
        ("utf-16", b"plain words", "BOM: leave --encoding out if it is UTF-8, or give "),
        ("utf-16", "words".encode("utf-16-le"), "BOM: .* or give --encoding utf-16-le"),
        ("utf-16-le", b"odd", "byte 0x64 at offset 2: leave --encoding out"),
        ("punycode", b"plain words - and a dash ~\n", ".*give the right one"),
        ("ascii", b"caf\xc3\xa9", "byte 0xc3 at offset 3: leave --encoding out"),
        ("utf-7", b"a lone surrogate: +2AA-", "surrogates not allowed: leave --encoding out"),
    ],
)
def test_wrong_encoding(tmp_path, encoding, raw, words) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    text_format = TextFormat(encoding=encoding)
    words = f"bad.txt: not {encoding}: .*{words}"
    expect_error(tmp_path, words, "bad.txt", text_format=text_format)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_lines_in_an_encoding_without_byte_newlines(tmp_path, encoding) -> None:
    (tmp_path / "t.jsonl").write_bytes(f"{GOOD}\n{GOOD}".encode(encoding))
    words = f"JSON lines cannot be split in {encoding}: save it as UTF-8"
    expect_error(tmp_path, words, "t.jsonl", text_format=TextFormat(encoding=encoding))
    expect_error(tmp_path, "line 1: .*: (save it as UTF-8|fix it)", "t.jsonl")


def test_json_line_in_the_wrong_encoding(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "caf\xc3\xa9"}\n')
    words = "t.jsonl, line 2: not ascii: byte 0xc3 at offset 13: leave --encoding out"
    expect_error(tmp_path, words, "t.jsonl", text_format=TextFormat(encoding="ascii"))
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "caf\xe9"}\n')
    expect_error(tmp_path, "line 2: not utf-8: byte 0xe9 at offset 13", "t.jsonl")


def test_missing_files(tmp_path) -> None:
    expect_error(tmp_path, r"nothing.txt: there is no such file", "nothing.txt")
    expect_error(tmp_path, r"\*.txt: nothing matches this pattern", "*.txt")
    (tmp_path / "empty").mkdir()
    expect_error(tmp_path, r"e\*: only folders match this pattern: .* add /\*", "e*")
    (tmp_path / "empty" / "picture.png").write_bytes(b"PNG")
    expect_error(tmp_path, "no text in this folder", "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_file_that_changes_while_it_is_read(tmp_path, name) -> None:
    path, text = tmp_path / name, f"{GOOD}\n{GOOD}\n".encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    if path.suffix == ".parquet":
        write_parquet(path, [GOOD, GOOD])
    selection = select_files(PrepareRequest((str(path),)))
    os.utime(path, ns=(0, 0))  # as after writing to it
    words = f"{name} changed while it was read: run the same command again"
    expect_error(tmp_path, words, name, selection=selection)


def test_failed_read_names_the_file(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "t.txt").write_text("words")
    monkeypatch.setattr(text_io, "_decompressed_blocks", fail)
    with pytest.raises(OSError, match=r"t\.txt") as caught:
        run_prepare(tmp_path, "t.txt")
    assert caught.value.errno == errno.EIO


@pytest.fixture
def locked_files(monkeypatch) -> None:
    """Files named locked cannot be opened: tests may run as root, who may read all."""
    for module, name in ((Path, "open"), (files, "open_regular")):
        real_open = getattr(module, name)

        def open_unlocked(path: Path, mode: str = "rb", *args, real_open=real_open, **options):
            if path.stem.startswith("locked") and "r" in mode:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real_open(path, mode, *args, **options)

        monkeypatch.setattr(module, name, open_unlocked)


@pytest.mark.parametrize("shard_bytes", [20, 2**26])
@pytest.mark.parametrize("name", ["locked.txt", "locked.jsonl", "locked.txt.gz"])
def test_file_without_permission_is_skipped_and_counted(
    tmp_path, messages, locked_files, name, shard_bytes
) -> None:
    for file in (name, "locked-copy.txt", "a.txt", "b.jsonl"):
        (tmp_path / file).write_text(f"{GOOD}\n")
    with pytest.raises(PermissionError, match=name):
        run_prepare(tmp_path, name, "a.txt")
    names = (name, "a.txt", "locked-copy.txt", "b.jsonl")
    index = run_prepare(tmp_path, *names, skip_bad=True, shard_bytes=shard_bytes)
    assert (count_documents(index), index.record["skipped"]) == (2, {"permission denied": 2})
    assert any(line.endswith(f"/{name}: permission denied") for line in messages)


def test_file_on_a_damaged_disk_is_skipped_and_counted(tmp_path, monkeypatch) -> None:
    blocks_of = text_io._decompressed_blocks

    def read(source, *args):
        for number, block in enumerate(blocks_of(source, *args)):
            if source.path.stem == "damaged" and number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield block

    monkeypatch.setattr(text_io, "BLOCK_BYTES", 64)
    monkeypatch.setattr(text_io, "_decompressed_blocks", read)
    for name in ("damaged.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(f"{GOOD}\n" * 4)
    index = run_prepare(tmp_path, "damaged.jsonl", "a.jsonl", skip_bad=True)
    # Of the damaged file, what precedes the damage is kept, as of a damaged archive.
    assert index.record["skipped"] == {"input/output error": 1}
    assert 4 < count_documents(index) < 8


def test_too_many_open_files_are_no_bad_input(tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    (tmp_path / "t.txt").write_text("words")
    monkeypatch.setattr(text_io, "_decompressed_blocks", fail)
    with pytest.raises(OSError, match=r"t\.txt"):
        run_prepare(tmp_path, "t.txt", skip_bad=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read all folders")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_folder_without_permission_is_skipped(tmp_path, messages, mode) -> None:
    inner = tmp_path / "texts/inner"
    inner.mkdir(parents=True)
    for path in (inner / "a.txt", tmp_path / "texts/b.txt"):
        path.write_text("Some text, and some more.")
    inner.chmod(mode)
    with pytest.raises(PermissionError):
        run_prepare(tmp_path, "texts")
    index = run_prepare(tmp_path, "texts", skip_bad=True)
    assert sum(index.total(split, "bytes") for split in SPLITS) == 25
    assert any("skipped " in line and "permission denied" in line for line in messages)
    inner.chmod(0o755)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "bad.jsonl, line 3: not JSON"),
        ('{"text": ', "line 3: not JSON"),
        ("[1, 2]", "line 3: a list, not an object: give objects with a field 'text'"),
        ('{"body": "x", "id": 3}', "line 3: no field 'text': other objects have it"),
        ('{"text": null}', "line 3: field 'text' is null: fill it in"),
        ('{"text": 7}', "line 3: field 'text' is not text but of type int: none of its fields"),
        ('{"text": "a\\u0000b"}', "bad.jsonl, document 3: NUL character"),
        ("[" * 100_000, "line 3: not JSON"),
    ],
)
def test_bad_json_line_is_refused_or_skipped(tmp_path, line, words) -> None:
    (tmp_path / "bad.jsonl").write_text("\n".join([GOOD, GOOD, line, GOOD, "", GOOD]))
    expect_error(tmp_path, words, "bad.jsonl")
    index = run_prepare(tmp_path, "bad.jsonl", skip_bad=True)
    assert count_documents(index) == 4
    assert sum(index.record["skipped"].values()) == 1


def test_line_number_in_a_file_read_in_parts(tmp_path) -> None:
    lines = [GOOD] * 300
    lines[250] = "not json"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 251: not JSON"):
        run_prepare(tmp_path, "bad.jsonl", shard_bytes=500, val_fraction=0.0)


def test_json_line_too_long_for_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gptforge.data.prepare.json_reader.MAX_LINE_LENGTH", 2**18)
    monkeypatch.setattr(text_io, "MAX_LINE_LENGTH", 2**18)
    line = json.dumps({"text": "x" * 2**20})
    (tmp_path / "bad.jsonl").write_text("\n".join([GOOD, line, GOOD]))
    expect_error(tmp_path, "line 2: longer than 0 MB", "bad.jsonl")
    assert count_documents(run_prepare(tmp_path, "bad.jsonl", skip_bad=True)) == 2


def test_long_line_of_words_is_text(tmp_path) -> None:
    text = "word and word " * 400_000
    (tmp_path / "t.txt").write_text(text)
    index = run_prepare(tmp_path, "t.txt", shard_bytes=2**20)
    assert sum(index.total(split, "bytes") for split in SPLITS) == len(text)


def test_text_without_spaces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "MAX_UNBROKEN_CHARS", 2_000_000)
    (tmp_path / "t.txt").write_text("x" * 5_000_000)
    expect_error(tmp_path, "t.txt: 2,000,000 characters without a", "t.txt")


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz", "t.txt.xz", "t.txt.zst"])
def test_damaged_compressed_file(tmp_path, name) -> None:
    raw = random.Random(1).randbytes(20_000).hex().encode()
    if name.endswith("zst"):
        raw = pytest.importorskip("zstandard").compress(raw)
    elif name.endswith("xz"):
        raw = lzma.compress(raw)
    elif name == "t.jsonl.gz":
        lines = [json.dumps({"text": f"Wherefore, {i} times over"}) for i in range(4000)]
        raw = gzip.compress("\n".join(lines).encode())
    else:
        raw = gzip.compress(raw)
    (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    expect_error(tmp_path, f"{name}: damaged", name)
    (tmp_path / name).write_bytes(b"this was never compressed" * 100)
    expect_error(tmp_path, f"{name}: damaged", name)
    (tmp_path / "good.txt").write_text("Good text, and enough of it to be cut.")
    index = run_prepare(tmp_path, name, "good.txt", skip_bad=True)
    assert sum(index.record["skipped"].values()) == 1


def test_damaged_parquet_row_group(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    rng = random.Random(1)
    rows = [f"row {i} " + rng.randbytes(30).hex() for i in range(300)]
    pq.write_table(
        pa.table({"text": rows}), path, row_group_size=100, compression="gzip", use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    offset = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[offset + 200 : offset + 3000] = bytes(2800)
    path.write_bytes(raw)
    expect_error(tmp_path, "t.parquet, row group 2 of 3: damaged row group", "t.parquet")
    index = run_prepare(tmp_path, "t.parquet", skip_bad=True)
    assert 200 <= count_documents(index) < 300
    assert index.record["skipped"] == {"damaged row group": 1}


def test_missing_parquet_column(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "t.parquet")
    expect_error(tmp_path, "no column 'text': it has body: choose one", "t.parquet")
    words = "column 'n' is not text but of type int64: it has body: choose one"
    expect_error(tmp_path, words, "t.parquet", text_format=TextFormat(field="n"))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but no more")
    expect_error(tmp_path, "damaged Parquet file", "t.parquet")


def test_lone_surrogates_are_replaced(tmp_path) -> None:
    lines = ['{"text": "a\\ud83d b"}', '{"text": "a\\ude00 b"}', GOOD]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert count_documents(run_prepare(tmp_path, "t.jsonl", val_fraction=0.0)) == 3


def test_documents_that_are_skipped_are_numbered(tmp_path) -> None:
    lines = [r'{"text": "a\u0000"}', GOOD, GOOD, r'{"text": "b\u0000"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    bad_input = BadInputHandler(skip=True)
    (source,) = find_sources([str(tmp_path / "t.jsonl")])
    assert len(list(read_documents(InputPart(source, bad_input=bad_input)))) == 2
    numbers = [example.partition("document ")[2] for example in bad_input.examples]
    assert numbers == ["1: NUL character", "4: NUL character"]


def test_any_column_of_strings_is_text(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array(["x", "y"], kind)}), tmp_path / "t.parquet")
        (source,) = find_sources([str(tmp_path / "t.parquet")])
        assert [text for _, text in read_documents(InputPart(source))] == ["x", "y"]


def test_full_disk_leaves_no_partial_shard(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.txt").write_text("Some text, and some more.")

    def raise_enospc(self, tokens) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", raise_enospc)
    with pytest.raises(RunError, match=r"disk is full.*the same command"):
        run_prepare(tmp_path, "t.txt")
    assert not list((tmp_path / "out").glob("**/*.bin"))
    monkeypatch.undo()
    assert run_prepare(tmp_path, "t.txt").total("train", "tokens") > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_names_the_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.txt").write_text("Some text, and some more.")
    real_open = Path.open

    def open_dev_full(path, *args, **options):
        is_shard = path.name.endswith(".partial.bin") and args == ("wb",)
        return real_open(Path("/dev/full") if is_shard else path, *args, **options)

    monkeypatch.setattr(Path, "open", open_dev_full)
    with pytest.raises(RunError, match=r"out/train_000000.bin: the disk is full: free some space"):
        run_prepare(tmp_path, "t.txt")


def test_error_of_a_worker_process(tmp_path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    lines[333] = "not json"
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    request = PrepareRequest((str(tmp_path / "t.jsonl"),), shard_bytes=1000)
    with pytest.raises(UserError, match="line 334: not JSON"):
        prepare(tmp_path / "out", request, num_workers=2)
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_command_reports_what_it_skipped(tmp_path, program) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join([GOOD, "not json", GOOD, "nor this", GOOD]))
    refused = program("prepare", "t.jsonl", "--out", "out")
    assert refused.code == 2
    assert refused.err.startswith("error: t.jsonl, line 2: not JSON")
    assert len(refused.err.splitlines()) == 1
    done = program("prepare", "t.jsonl", "--out", "out", "--skip_bad", "true")
    assert done.code == 0
    assert "2 x not JSON" in done.err
    assert "t.jsonl, line 4: not JSON" in done.err
    assert "Train on it: " in done.out


def test_error_if_all_input_was_skipped(tmp_path, program) -> None:
    (tmp_path / "t.jsonl").write_text("not json\n\n[1, 2]\nnor this\n")
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    done = program("prepare", "t.jsonl", "t.txt", "--out", "out", "--skip_bad", "true")
    assert done.code == 2
    assert "empty" not in done.err
    assert "(2 x not JSON, 1 x a list, not an object" in done.err
    assert "first t.jsonl, line 1: not JSON: fix it" in done.err


@pytest.mark.parametrize("with_eot", [True, False])
def test_character_that_the_tokenizer_lacks(tmp_path, with_eot) -> None:
    (tmp_path / "a.txt").write_text("abc abc abc")
    (tmp_path / "b.txt").write_text("abd")
    tokenizer = CharTokenizer(" abc", with_eot=with_eot)
    with pytest.raises(UserError, match=r"/b\.txt: the character 'd' is not in"):
        run_prepare(tmp_path, "a.txt", "b.txt", tokenizer=tokenizer)


def test_error_can_be_pickled() -> None:
    error = BadInputError("a.jsonl, line 3: not JSON", "fix it")
    # copy uses what pickle does.
    other = copy.copy(error)
    assert str(other) == str(error)
    assert (other.problem, other.hint) == (error.problem, error.hint)


def test_repeated_long_parquet_rows_are_read_in_small_batches(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text, path = "x" * 2**22, tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": range(40), "text": [text] * 40}), path, compression="zstd")
    assert path.stat().st_size < 10**4
    (source,) = find_sources([str(path)])
    metadata = pq.ParquetFile(path).metadata
    assert rows_per_batch(metadata, 0, "text") * len(text) <= MAX_BATCH_BYTES
    assert [document for _, document in read_documents(InputPart(source))] == [text] * 40


@pytest.mark.parametrize(("size", "rows"), [(10, 16), (2**25, 8), (2**27, 2), (2**31, 1)])
def test_rows_per_batch_by_row_group_size(size, rows) -> None:
    column = SimpleNamespace(
        path_in_schema="text", total_uncompressed_size=size, total_compressed_size=size // 3
    )
    group = SimpleNamespace(num_columns=1, column=lambda _: column)
    assert rows_per_batch(SimpleNamespace(row_group=lambda _: group), 0, "text") == rows


def test_row_group_that_decompresses_to_gigabytes(tmp_path, monkeypatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(table_reader, "MAX_BATCH_BYTES", 2**20)
    table, path = pa.table({"text": ["x" * 10**6] * 8}), tmp_path / "t.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    expect_error(tmp_path, "row group 1 of 1: decompresses from ", "t.parquet")


@pytest.mark.skipif(os.name == "nt", reason="needs devices")
@pytest.mark.parametrize("flags", [
    ("--preset", "debug", "--input", "/dev/zero"),
    ("prepare", "/dev/zero", "--out", "out"),
    ("tokenizer", "train", "/dev/zero", "--vocab_size", 300, "--out", "own.json"),
])  # fmt: skip
def test_device_is_refused(program, flags) -> None:
    done = program(*flags)
    assert done.code == 2
    assert "error: /dev/zero is a device, not a regular file" in done.err


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_pipe_as_shard_or_config_is_refused(program) -> None:
    Path("shards").mkdir()
    os.mkfifo("shards/a.bin")
    done = program("--preset", "debug", "--input", "shards")
    assert (done.code, "a.bin: not a readable token shard (a named pipe" in done.err) == (2, True)
    os.mkfifo("c.toml")
    done = program("--config", "c.toml")
    assert (done.code, "c.toml: not a readable TOML file (a named pipe" in done.err) == (2, True)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_progress_folder_that_is_a_link_is_refused(program, play, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "out" / ".preparing").symlink_to(tmp_path / "mine")
    done = program("prepare", play, "--out", "out")
    assert (done.code, ".preparing is a symbolic link: delete it" in done.err) == (2, True)
    assert not any((tmp_path / "mine").iterdir())


UTF8 = "café naïve ".encode() * 50
REPLACE = TextFormat(encoding="utf-8:replace")


@pytest.mark.parametrize(
    ("raw", "words", "absent"),
    [
        (UTF8 + b"\xff" + UTF8, "offset 650: everything else is UTF-8, with 1 such", "latin-1"),
        (UTF8 + b"\xff \xfe" + UTF8, "with 2 such places: correct them, or --encod", "latin-1"),
        (UTF8 + b"caf\xc3", "everything else is UTF-8, with 1 such place", "latin-1"),
        (b"caf\xe9 " * 9, "give its encoding, such as --encoding latin-1, or", "UTF-8"),
        (b"\x93quoted\x94 caf\xe9", "such as --encoding cp1252, or", "latin-1"),
    ],
)
def test_hint_for_undecodable_bytes(tmp_path, raw, words, absent) -> None:
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(BadInputError, match=words) as caught:
        run_prepare(tmp_path, "t.txt")
    assert absent not in str(caught.value)
    # No text would be left without the file.
    assert "--skip_bad" not in str(caught.value)
    assert "--encoding utf-8:replace" in str(caught.value)


def test_undecodable_bytes_are_replaced_on_request(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(UTF8 + b"\xff\r\n" + UTF8)
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "a \xff b"}\n')
    (tmp_path / "t.csv").write_bytes(b"text,n\na \xff b,1\n")
    names = ("t.txt", "t.jsonl", "t.csv")
    index = run_prepare(tmp_path, *names, text_format=REPLACE, tokenizer="byte")
    tokens = b"".join(
        (index.folder / shard["file"]).read_bytes()[1024::2] for shard in index.record["shards"]
    )
    assert tokens.count("\ufffd".encode()) == 3
    assert (UTF8 + "\ufffd\n".encode() + UTF8) in tokens
    notices = index.record["notices"]
    assert sum(text_io.REPLACED_NOTICE in notice for notice in notices) == 3
    with pytest.raises(UserError, match="only :replace may follow the name"):
        TextFormat(encoding="utf-8:nonsense")


def test_replacement_in_a_file_read_in_chunks(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(UTF8 + b"\xff" + UTF8)
    options = {"text_format": REPLACE, "tokenizer": "byte", "shard_bytes": 100}
    index = run_prepare(tmp_path, "t.txt", **options)
    assert sum(index.total(split, "bytes") for split in SPLITS) == 2 * len(UTF8) + 3


def test_offset_of_a_nul_after_replaced_bytes(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\xff\xffb\0c")
    expect_error(tmp_path, "NUL byte at offset 4", "t.txt", text_format=REPLACE)


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("t.jsonl", f'{GOOD}\n{{"txt": "a"}}\n{GOOD}\n', "line 2"),
        ("t.jsonl", f'{{"txt": "a"}}\n{GOOD}\n', "line 1"),
        ("t.json", f'[{GOOD}, {{"text": 5, "txt": "a"}}]', "element 2"),
    ],
)
def test_another_field_is_not_suggested_if_other_records_have_it(
    tmp_path, name, text, where
) -> None:
    (tmp_path / name).write_text(text)
    expect_error(tmp_path, f"{where}: .*: other objects have it: correct or remove this one", name)


def test_carriage_returns_and_lone_surrogates_are_noted(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(b"old\rline ends\rof CR alone")
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud83d b"}\n{"text": "a\\r\\n b"}\n')
    notices = run_prepare(tmp_path, "t.txt", "t.jsonl").record["notices"]
    for words in ("t.txt: kept CR without", "t.jsonl: replaced lone", "t.jsonl: turned CRLF"):
        assert any(words in notice for notice in notices)
