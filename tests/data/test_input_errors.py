"""Bad input: one line that names the file and the place, or left out and counted. No traceback."""

import copy
import errno
import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptforge.data.index import Index
from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare import job as job_module
from gptforge.data.prepare import readers as documents_module
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.readers import read_documents
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.data.prepare.table_reader import MAX_BATCH_BYTES, rows_per_batch
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.char import CharTokenizer

GOOD = json.dumps({"text": "Wherefore art thou Romeo?"})


def attempt(tmp_path: Path, *names: str, form: TextFormat | None = None, **options) -> Index:
    request = PrepareRequest(
        tuple(str(tmp_path / name) for name in names), form=form or TextFormat(), **options
    )
    return prepare(tmp_path / "out", request, num_workers=1)


def expect_refused(tmp_path: Path, words: str, *names: str, **options) -> None:
    with pytest.raises(UserError, match=words):
        attempt(tmp_path, *names, **options)
    # Nothing that looks whole is left behind.
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty: there is no text"),
        (b" \n\t\n", "empty: there is no text"),
        (b"caf\xe9 au lait", r"bad.txt: not utf-8: byte 0xe9 at offset 3: .*--encoding latin-1"),
        (b"a" * 5000 + b"\xff", "byte 0xff at offset 5000"),
        (b"\xff\xfeb\0", "NUL bytes as well: this is a binary file"),
        (b"\xe6\x97", "byte 0xe6 at offset 0"),
        (b"PNG\0\0data", "NUL byte at offset 3: this is a binary file"),
        (b"\xef\xbb\xbfab\0", "NUL byte at offset 5"),
        ("text".encode("utf-16-le"), "NUL byte at offset 1"),
    ],
)
def test_a_file_that_is_no_text_is_refused_with_the_place(tmp_path, raw, words) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    expect_refused(tmp_path, words, "bad.txt")


def test_offsets_are_right_behind_the_first_block(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK", 7)
    text = "日本\r\nnaïve ".encode() * 5
    (tmp_path / "bad.txt").write_bytes(text + b"\xff")
    expect_refused(tmp_path, f"byte 0xff at offset {len(text)}", "bad.txt")
    (tmp_path / "bad.txt").write_bytes(text + b"\0")
    expect_refused(tmp_path, f"NUL byte at offset {len(text)}", "bad.txt")


def test_another_encoding_is_read_when_it_is_named(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(("caf\xe9 au lait\r\n" * 9).encode("latin-1"))
    index = attempt(tmp_path, "t.txt", form=TextFormat(encoding="latin-1"))
    assert index.total("train", "bytes") > index.total("train", "characters")
    for nonsense in ("klingon", "hex", "undefined"):
        with pytest.raises(UserError, match=f"{nonsense}: there is no such encoding"):
            TextFormat(encoding=nonsense)


@pytest.mark.parametrize(
    ("encoding", "raw", "words"),
    [
        (
            "utf-16",
            b"plain words",
            "not utf-16: .*BOM: leave --encoding out if it is UTF-8, or say ",
        ),
        (
            "utf-16",
            "words".encode("utf-16-le"),
            "not utf-16: .*BOM: .* or say --encoding utf-16-le",
        ),
        ("utf-16-le", b"odd", "not utf-16-le: byte 0x64 at offset 2: leave --encoding out"),
        ("punycode", b"plain words - and a dash ~\n", "not punycode: .*name the right one"),
        ("ascii", b"caf\xc3\xa9", "not ascii: byte 0xc3 at offset 3: leave --encoding out"),
    ],
)
def test_a_text_that_is_not_in_the_encoding_named_for_it_is_refused_in_one_line(
    tmp_path, encoding, raw, words
) -> None:
    (tmp_path / "bad.txt").write_bytes(raw)
    expect_refused(tmp_path, f"bad.txt: {words}", "bad.txt", form=TextFormat(encoding=encoding))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_lines_in_an_encoding_that_hides_the_line_ends_are_to_be_saved_anew(
    tmp_path, encoding
) -> None:
    (tmp_path / "t.jsonl").write_bytes(f"{GOOD}\n{GOOD}".encode(encoding))
    words = f"JSON lines cannot be told apart in {encoding}: save it as UTF-8"
    expect_refused(tmp_path, words, "t.jsonl", form=TextFormat(encoding=encoding))
    expect_refused(tmp_path, "line 1: .*: (save it as UTF-8|mend it)", "t.jsonl")


def test_json_lines_in_a_wrong_encoding_are_refused_with_their_number(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "caf\xc3\xa9"}\n')
    words = "t.jsonl, line 2: not ascii: byte 0xc3 at offset 13: leave --encoding out"
    expect_refused(tmp_path, words, "t.jsonl", form=TextFormat(encoding="ascii"))


def test_what_is_not_there_is_named(tmp_path) -> None:
    expect_refused(tmp_path, r"nothing.txt: there is no such file", "nothing.txt")
    expect_refused(tmp_path, r"\*.txt: nothing matches this pattern", "*.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "picture.png").write_bytes(b"PNG")
    expect_refused(tmp_path, "no text in this folder", "empty")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", r"bad.jsonl, line 3: not JSON"),
        ('{"text": ', r"line 3: not JSON"),
        ("[1, 2]", r"line 3: a list and no object: give objects with a field 'text'"),
        (
            '{"body": "x", "id": 3}',
            r"line 3: no field 'text': it has body: choose one with --field",
        ),
        (
            '{"text": null}',
            r"line 3: field 'text' is no text but of type NoneType: none",
        ),
        (
            '{"text": 7}',
            r"line 3: field 'text' is no text but of type int: none of its fields .text. is",
        ),
        ('{"text": "a\\u0000b"}', r"bad.jsonl, document 3: NUL character"),
        ("[" * 100_000, r"line 3: not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_refused_or_counted(tmp_path, line, words) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([GOOD, GOOD, line, GOOD, "", GOOD]))
    expect_refused(tmp_path, words, "bad.jsonl")
    index = attempt(tmp_path, "bad.jsonl", skip_bad=True)
    assert index.total("train", "documents") + index.total("val", "documents") == 4
    assert sum(index.record["skipped"].values()) == 1


def test_a_line_in_another_encoding_is_refused_with_its_number(tmp_path) -> None:
    raw = GOOD.encode() + b'\n{"text": "caf\xe9"}\n'
    (tmp_path / "bad.jsonl").write_bytes(raw)
    expect_refused(tmp_path, "line 2: not utf-8: byte 0xe9 at offset 13", "bad.jsonl")


def test_line_numbers_are_right_in_the_middle_of_a_file(tmp_path) -> None:
    lines = [GOOD] * 300
    lines[250] = "not json"
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    # With a hundred documents and more, a file is read in stretches.
    with pytest.raises(UserError, match="line 251: not JSON"):
        attempt(tmp_path, "bad.jsonl", shard_bytes=500, val_fraction=0.0)


def test_a_line_too_long_for_memory_is_refused_or_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(documents_module, "MAX_LINE_BYTES", 3_000_000)
    long = json.dumps({"text": "x" * 8_000_000})
    (tmp_path / "bad.jsonl").write_text("\n".join([GOOD, long, GOOD]))
    expect_refused(tmp_path, "line 2: longer than 2 MB", "bad.jsonl")
    index = attempt(tmp_path, "bad.jsonl", skip_bad=True)
    assert index.total("train", "documents") + index.total("val", "documents") == 2


def test_a_long_line_of_words_is_a_text(tmp_path) -> None:
    text = "word and word " * 400_000
    (tmp_path / "t.txt").write_text(text)
    index = attempt(tmp_path, "t.txt", shard_bytes=2**20)
    assert index.total("train", "bytes") + index.total("val", "bytes") == len(text)


def test_megabytes_without_a_blank_are_no_text(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(job_module, "MAX_UNBROKEN_CHARS", 2_000_000)
    monkeypatch.setattr(job_module, "SMALL_FILE_BYTES", 1)
    (tmp_path / "t.txt").write_text("x" * 5_000_000)
    expect_refused(tmp_path, "without a blank: this is no text", "t.txt")


@pytest.mark.parametrize("name", ["t.txt.gz", "t.jsonl.gz", "t.txt.xz", "t.txt.zst"])
def test_a_damaged_packed_file_is_refused_or_left_out(tmp_path, name) -> None:
    if name.endswith("zst"):
        zstandard = pytest.importorskip("zstandard")
        whole = zstandard.compress(os.urandom(20_000).hex().encode())
    elif name.endswith("xz"):
        import lzma

        whole = lzma.compress(os.urandom(20_000).hex().encode())
    else:
        lines = [json.dumps({"text": f"Wherefore, {i} times over"}) for i in range(4000)]
        whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    expect_refused(tmp_path, f"{name}: damaged", name)
    (tmp_path / name).write_bytes(b"this was never packed" * 100)
    expect_refused(tmp_path, f"{name}: damaged", name)
    (tmp_path / "good.txt").write_text("Good text, and enough of it to be cut.")
    index = attempt(tmp_path, name, "good.txt", skip_bad=True)
    assert sum(index.record["skipped"].values()) == 1


def test_parquet_that_cannot_be_read_is_refused_with_the_row_group(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    rows = [f"row {i} " + os.urandom(30).hex() for i in range(300)]
    pq.write_table(
        pa.table({"text": rows}), path, row_group_size=100, compression="gzip", use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    raw[at + 200 : at + 3000] = bytes(2800)
    path.write_bytes(raw)
    expect_refused(tmp_path, "t.parquet, row group 2 of 3: damaged row group", "t.parquet")
    index = attempt(tmp_path, "t.parquet", skip_bad=True)
    total = index.total("train", "documents") + index.total("val", "documents")
    assert 200 <= total < 300
    assert index.record["skipped"] == {"damaged row group": 1}


def test_parquet_without_the_column_is_refused_with_those_it_has(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "t.parquet")
    expect_refused(tmp_path, "no column 'text': it has body: choose one", "t.parquet")
    expect_refused(
        tmp_path,
        "column 'n' is no text but of type int64: it has body: choose one",
        "t.parquet",
        form=TextFormat(field="n"),
    )
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but no more")
    expect_refused(tmp_path, "damaged Parquet file", "t.parquet")


def test_half_of_a_surrogate_pair_does_no_harm(tmp_path) -> None:
    lines = ['{"text": "a\\ud83d b"}', '{"text": "a\\ude00 b"}', GOOD]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    index = attempt(tmp_path, "t.jsonl", val_fraction=0.0)
    assert index.total("train", "documents") == 3


def test_a_full_disk_is_said_and_leaves_no_half_of_a_shard(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.txt").write_text("Some text, and some more.")

    def full(self, tokens) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(RunError, match=r"disk is full.*the same command goes on"):
        attempt(tmp_path, "t.txt")
    assert not list((tmp_path / "out").glob("**/*.bin"))
    monkeypatch.undo()
    assert attempt(tmp_path, "t.txt").total("train", "tokens") > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a full disk to try")
def test_a_disk_that_takes_no_byte_of_a_shard_is_named_with_the_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.txt").write_text("Some text, and some more.")
    real = Path.open

    def full(path, *args, **how):
        is_shard = path.name.endswith(".partial.bin") and args == ("wb",)
        return real(Path("/dev/full") if is_shard else path, *args, **how)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"out/train_000000.bin: the disk is full: make room"):
        attempt(tmp_path, "t.txt")


def test_an_error_of_one_process_ends_the_others_with_its_words(tmp_path) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(400)]
    lines[333] = "not json"
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="line 334: not JSON"):
        prepare(
            tmp_path / "out",
            PrepareRequest((str(tmp_path / "t.jsonl"),), shard_bytes=1000),
            num_workers=2,
        )
    assert not list((tmp_path / "out").glob("*.partial*"))


def test_the_program_says_what_was_left_out(tmp_path, program) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join([GOOD, "not json", GOOD, "nor this", GOOD]))
    refused = program("prepare", "t.jsonl", "--out", "out")
    assert refused.code == 2
    assert refused.err.startswith("error: t.jsonl, line 2: not JSON")
    assert len(refused.err.splitlines()) == 1
    done = program("prepare", "t.jsonl", "--out", "out", "--skip_bad", "true")
    assert done.code == 0
    assert "left out: 2 x not JSON" in done.err
    assert "t.jsonl, line 4: not JSON" in done.err
    assert "Train on it: " in done.out


def test_where_all_was_left_out_it_is_said_why_not_that_there_was_nothing(
    tmp_path, program
) -> None:
    (tmp_path / "t.jsonl").write_text("not json\n\n[1, 2]\nnor this\n")
    (tmp_path / "t.txt").write_bytes(b"caf\xe9")
    done = program("prepare", "t.jsonl", "t.txt", "--out", "out", "--skip_bad", "true")
    assert done.code == 2
    assert "empty" not in done.err
    assert "all that is in there was left out (2 x not JSON, 1 x a list and no object" in done.err
    assert "first t.jsonl, line 1: not JSON: mend it" in done.err


@pytest.mark.parametrize("whole", [0, 10**6])
@pytest.mark.parametrize("marks", [True, False])
def test_a_character_that_the_tokenizer_lacks_is_named_with_its_file(
    tmp_path, monkeypatch, marks, whole
) -> None:
    monkeypatch.setattr(job_module, "SMALL_FILE_BYTES", whole)
    (tmp_path / "a.txt").write_text("abc abc abc")
    (tmp_path / "b.txt").write_text("abd")
    known = CharTokenizer(" abc", with_eot=marks)
    with pytest.raises(UserError, match=r"/b\.txt: the character 'd' is not in"):
        attempt(tmp_path, "a.txt", "b.txt", tokenizer=known)


def test_a_refusal_travels_between_processes() -> None:
    error = BadInputError("a.jsonl, line 3: not JSON", "mend it")
    # A copy is made in the way in which one is made in another process.
    other = copy.copy(error)
    assert str(other) == str(error)
    assert (other.problem, other.hint) == (error.problem, error.hint)


def test_rows_of_a_dictionary_are_taken_as_few_as_fit_into_memory(tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    long, path = "x" * 2**22, tmp_path / "t.parquet"
    pq.write_table(pa.table({"n": range(40), "text": [long] * 40}), path, compression="zstd")
    assert path.stat().st_size < 10**4
    (source,) = find_sources([str(path)])
    metadata = pq.ParquetFile(path).metadata
    assert rows_per_batch(metadata, 0, "text") * len(long) <= MAX_BATCH_BYTES
    texts = [d.text for d in read_documents(source, TextFormat(), BadInputHandler(skip=False))]
    assert texts == [long] * 40


@pytest.mark.parametrize(("size", "rows"), [(10, 16), (2**25, 8), (2**27, 2), (2**31, 1)])
def test_larger_row_groups_are_read_in_fewer_rows(size, rows) -> None:
    column = SimpleNamespace(
        path_in_schema="text", total_uncompressed_size=size, total_compressed_size=size // 3
    )
    group = SimpleNamespace(num_columns=1, column=lambda _: column)
    assert rows_per_batch(SimpleNamespace(row_group=lambda _: group), 0, "text") == rows


def test_a_row_group_that_unpacks_to_gigabytes_is_refused(tmp_path, monkeypatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("gptforge.data.prepare.readers.ROWS_BYTES", 2**20)
    pq.write_table(
        pa.table({"text": ["x" * 10**6] * 8}),
        tmp_path / "t.parquet",
        compression="zstd",
        use_dictionary=False,
    )
    expect_refused(tmp_path, "row group 1 of 1: unpacks from ", "t.parquet")


@pytest.mark.skipif(os.name == "nt", reason="needs devices")
@pytest.mark.parametrize("flags", [
    ("--preset", "debug", "--input", "/dev/zero"),
    ("prepare", "/dev/zero", "--out", "out"),
    ("tokenizer", "train", "/dev/zero", "--vocab_size", 300, "--out", "own.json"),
])  # fmt: skip
def test_a_text_that_never_ends_is_refused_at_once(program, flags) -> None:
    done = program(*flags)
    assert done.code == 2
    assert "error: /dev/zero is a device, not a regular file" in done.err


@pytest.mark.skipif(os.name == "nt", reason="needs named pipes")
def test_a_pipe_among_shards_or_as_a_configuration_is_refused_at_once(program) -> None:
    Path("shards").mkdir()
    os.mkfifo("shards/a.bin")
    done = program("--preset", "debug", "--input", "shards")
    assert (done.code, "a.bin: not a readable token shard (a named pipe" in done.err) == (2, True)
    os.mkfifo("c.toml")
    done = program("--config", "c.toml")
    assert (done.code, "c.toml: not a readable TOML file (a named pipe" in done.err) == (2, True)


@pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")
def test_notes_of_a_preparation_are_not_kept_through_a_link(program, play, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "out" / ".preparing").symlink_to(tmp_path / "mine")
    done = program("prepare", play, "--out", "out")
    assert (done.code, ".preparing is a symbolic link: delete it" in done.err) == (2, True)
    assert not any((tmp_path / "mine").iterdir())


UTF8 = "café naïve ".encode() * 50


@pytest.mark.parametrize(
    ("raw", "words", "not_said"),
    [
        (UTF8 + b"\xff" + UTF8, r"offset 650: all else is UTF-8, with 1 such place", "latin-1"),
        (UTF8 + b"\xff \xfe" + UTF8, r"with 2 such places: correct them, or --encod", "latin-1"),
        (UTF8 + b"caf\xc3", r"all else is UTF-8, with 1 such place", "latin-1"),
        (b"caf\xe9 " * 9, r"say what it is with --encoding latin-1, or", "UTF-8"),
        (b"\x93quoted\x94 caf\xe9", r"say what it is with --encoding cp1252, or", "latin-1"),
    ],
)
def test_what_a_bad_byte_calls_for_depends_on_the_rest(tmp_path, raw, words, not_said) -> None:
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(BadInputError, match=words) as caught:
        attempt(tmp_path, "t.txt")
    assert not_said not in str(caught.value)
    # Nothing would be left without the file.
    assert "--skip_bad" not in str(caught.value)
    assert "--encoding utf-8:replace" in str(caught.value)


def test_bad_bytes_are_replaced_where_that_is_asked_for(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.txt").write_bytes(UTF8 + b"\xff\r\n" + UTF8)
    (tmp_path / "t.jsonl").write_bytes(GOOD.encode() + b'\n{"text": "a \xff b"}\n')
    (tmp_path / "t.csv").write_bytes(b"text,n\na \xff b,1\n")
    form = TextFormat(encoding="utf-8:replace")
    index = attempt(tmp_path, "t.txt", "t.jsonl", "t.csv", form=form, tokenizer="byte")
    tokens = b"".join(
        (index.folder / shard["file"]).read_bytes()[1024::2] for shard in index.record["shards"]
    )
    assert tokens.count("\ufffd".encode()) == 3
    assert (UTF8 + "\ufffd\n".encode() + UTF8) in tokens
    notices = index.record["notices"]
    assert sum("put U+FFFD where bytes are not in the encoding" in one for one in notices) == 3
    with pytest.raises(UserError, match="only :replace may stand behind a name"):
        TextFormat(encoding="utf-8:nonsense")


def test_a_long_file_with_bad_bytes_is_replaced_in_pieces(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(job_module, "SMALL_FILE_BYTES", 0)
    (tmp_path / "t.txt").write_bytes(UTF8 + b"\xff" + UTF8)
    form = TextFormat(encoding="utf-8:replace")
    index = attempt(tmp_path, "t.txt", form=form, tokenizer="byte", shard_bytes=100)
    assert sum(index.total(side, "bytes") for side in ("train", "val")) == 2 * len(UTF8) + 3


def test_a_nul_behind_replaced_bytes_is_named_with_its_place(tmp_path) -> None:
    (tmp_path / "t.txt").write_bytes(b"a\xff\xffb\0c")
    form = TextFormat(encoding="utf-8:replace")
    expect_refused(tmp_path, "NUL byte at offset 4", "t.txt", form=form)
