"""Files to text: decompressed, decoded and normalized block by block, in constant memory."""

import codecs
import errno
import functools
import gzip
import hashlib
import importlib
import importlib.util
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any, AnyStr

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.sources import COMPRESSION_BY_MAGIC, Source
from gptforge.errors import UserError, explain_os_error

# Large strings that alternate between one, two and four bytes per character fragment the heap of
# the C library, which then grows with the text; small ones hardly do.
BLOCK_BYTES = 2**15
MAX_LINE_LENGTH = 64 * 2**20  # per line or document: several copies must fit into memory
MAX_SNIFF_BYTES = 2**26  # searched to guess the encoding of a file
OFFSET_STRIDE = 2**20  # bytes between remembered offsets: every block would take too much memory
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # what the file is not the cause of
MAX_WINDOW_BYTES = 2**31  # of `zstd --long=31`, with which large dumps are compressed
BOM = "\ufeff"
HAS_STDLIB_ZSTD = importlib.util.find_spec("compression") is not None  # Python 3.14 and later
CRLF_NOTICE = "turned CRLF line ends into LF"
CR_NOTICE = "kept CR without LF, which is not turned into a line end"
SURROGATE_NOTICE = "replaced lone surrogates, which are not characters, with U+FFFD"
EXTRACT_HINT = "extract the text, and give that"
BINARY_BY_MAGIC = {
    b"PK\3\4": "a ZIP archive, as .docx and .epub are",
    b"%PDF": "a PDF",
    b"BZh": "a bzip2 file",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    **{magic: f"a .{name} file" for magic, name in COMPRESSION_BY_MAGIC.items()},
}
TAR_MAGIC, TAR_MAGIC_OFFSET = b"ustar", 257
REPLACED_NOTICE = "replaced bytes that are not in the encoding with U+FFFD"


def parse_encoding(encoding: str) -> tuple[str, str]:
    """Codec and error handler of an `--encoding` such as `utf-8:replace`."""
    name, _, errors = encoding.partition(":")
    return name, errors or "strict"


@dataclass(frozen=True)
class TextFormat:
    """How to find the text in a file."""

    field: str = "text"  # of a JSON object, or column of a table
    encoding: str = "utf-8"  # codec, optionally with :replace for undecodable bytes
    split_on: str = ""  # between the documents of a text file; empty: the file is one document

    def __post_init__(self) -> None:
        name, errors = parse_encoding(self.encoding)
        if errors not in ("strict", "replace"):
            raise UserError(f"--encoding {self.encoding}: only :replace may follow the name")
        try:
            "".encode(name)
        except (LookupError, UnicodeError):
            raise UserError(f"--encoding {self.encoding}: there is no such encoding") from None


@dataclass(frozen=True)
class Chunk:
    """Part of a file's text."""

    offset: int  # first byte in the decompressed file
    raw: str  # as decoded; it never ends between CR and LF
    text: str  # `raw` with CRLF turned into LF, and without a byte order mark


@dataclass
class InputPart:
    """A file, or a part of one, to read."""

    source: Source
    text_format: TextFormat = field(default_factory=TextFormat)
    bad_input: BadInputHandler = field(default_factory=BadInputHandler)
    start: int = 0  # byte of a text or of JSON lines, row group of Parquet
    stop: int | None = None  # one past the last
    bytes_read: int = 0  # of the file on disk, since `start`

    def note(self, notice: str) -> None:
        """Tell the user, once, what was repaired in this file."""
        self.bad_input.notices.add(f"{self.source.name}: {notice}")

    def note_fixes(self, chunk: Chunk) -> None:
        """Note what was normalized in a chunk, and carriage returns, which are not."""
        if chunk.offset == 0 and chunk.raw.startswith(BOM):
            self.note("dropped the byte order mark")
        if "\r\n" in chunk.raw:
            self.note(CRLF_NOTICE)
        if "\r" in chunk.text:
            self.note(CR_NOTICE)

    def read_blocks(self) -> Iterator[bytes]:
        """The decompressed bytes from `start` to `stop`."""
        source, start = self.source, self.start
        damage: list[type[Exception]] = [EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error]
        if source.compression == "zst":
            damage.append(_zstd_module(source).ZstdError)
        try:
            with source.path.open("rb") as disk:
                position, end = start, sys.maxsize if self.stop is None else self.stop
                for block in _decompressed_blocks(source, disk, start):
                    if part := block[: end - position]:
                        position += len(part)
                        self.bytes_read = (disk.tell() if source.compression else position) - start
                        yield part
                    if position == end:
                        break
                source.check_unchanged(os.fstat(disk.fileno()))
        except tuple(damage) as error:
            problem = f"damaged .{source.compression} ({error})"
            raise BadInput(problem, source.name, "download it again") from error
        except FileNotFoundError:
            raise UserError(f"{source.name}: the file no longer exists") from None
        except OSError as error:
            error.filename = error.filename or source.name  # a failed read does not name the file
            if not self.bad_input.skip or error.errno in OUT_OF_RESOURCES:
                raise
            problem, hint = explain_os_error(error)
            raise BadInput(problem, source.name, hint) from error

    def read_chunks(self) -> Iterator[Chunk]:
        """The text from `start` to `stop` in chunks."""
        codec, errors = parse_encoding(self.text_format.encoding)
        decoder = codecs.getincrementaldecoder(codec)(errors)
        read, undecoded, kept = self.start, 0, ""
        # An empty block at the end finalizes the decoder.
        for block in chain(self.read_blocks(), [b""]):
            offset = read - undecoded - len(kept)
            try:
                raw = kept + decoder.decode(block, final=not block)
                if codec != "utf-8":
                    raw.encode("utf-8")  # others, such as utf-7, may give lone surrogates
            except UnicodeError as error:
                problem, hint = describe_decode_error(self, error, block, read - undecoded)
                raise BadInput(problem, self.source.name, hint) from None
            read += len(block)
            undecoded = len(decoder.getstate()[0])
            # Keep back a CR, since an LF may follow.
            kept = "\r" if raw.endswith("\r") and block else ""
            raw = raw[: len(raw) - len(kept)]
            if "\0" in raw:
                position = read - len(block) + max(0, block.find(b"\0"))
                problem = f"NUL byte at offset {position}: this is a binary file or UTF-16"
                hint = "save it as text, or, if it is UTF-16, give --encoding utf-16"
                if offset == 0 and (found := _known_binary(block)):
                    problem, hint = f"{found}, not text", EXTRACT_HINT
                raise BadInput(problem, self.source.name, hint)
            if errors == "replace" and "\ufffd" in raw:
                self.note(REPLACED_NOTICE)
            if raw:
                text = (raw.removeprefix(BOM) if offset == 0 else raw).replace("\r\n", "\n")
                yield Chunk(offset, raw, text)


def _decompressed_blocks(source: Source, disk: IO[bytes], start: int) -> Iterator[bytes]:
    file: Any = disk
    if source.compression == "gz":
        file = gzip.GzipFile(fileobj=disk, mode="rb")
    elif source.compression == "xz":
        file = lzma.LZMAFile(disk)  # noqa: SIM115 (it has nothing to close)
    elif source.compression == "zst" and HAS_STDLIB_ZSTD:
        zstd = _zstd_module(source)
        options = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_BYTES.bit_length() - 1}
        file = zstd.ZstdFile(disk, "rb", options=options)
    elif source.compression == "zst":
        zstd = _zstd_module(source).ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return _zstd_blocks(disk, zstd.decompressobj)
    if start:
        file.seek(start)
    return iter(functools.partial(file.read, BLOCK_BYTES), b"")


def _zstd_blocks(disk: IO[bytes], new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress all frames; zstandard's own reader takes a truncated file for a complete one."""
    frame, ready = None, b""
    # In small blocks: the ratio of a malicious or repetitive file is unbounded.
    while compressed := disk.read(2**14):
        while compressed:
            frame = frame or new_frame()
            ready += frame.decompress(compressed)
            full = len(ready) - len(ready) % BLOCK_BYTES
            yield from (ready[i : i + BLOCK_BYTES] for i in range(0, full, BLOCK_BYTES))
            ready = ready[full:]
            compressed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file is truncated")
    yield ready


def _zstd_module(source: Source) -> Any:
    try:
        return importlib.import_module("compression.zstd" if HAS_STDLIB_ZSTD else "zstandard")
    except ImportError:
        hint = "pip install zstandard"
        raise UserError(f"{source.name}: .zst needs the package zstandard: {hint}") from None


@dataclass
class TextStats:
    """Statistics of a text file after normalization."""

    num_chars: int = 0
    sha256: str = ""
    is_blank: bool = True
    offsets: list[tuple[int, int]] = field(default_factory=list)  # byte of a chunk, chars before it

    @property
    def digest(self) -> int:
        """The digest of the text as a document."""
        return int(self.sha256[:16], 16)


def text_stats(chunks: Iterable[Chunk]) -> TextStats:
    """Statistics of all chunks of a text file."""
    stats, sha256 = TextStats(), hashlib.sha256()
    for chunk in chunks:
        if not stats.offsets or chunk.offset - stats.offsets[-1][0] >= OFFSET_STRIDE:
            stats.offsets.append((chunk.offset, stats.num_chars))
        stats.num_chars += len(chunk.text)
        stats.is_blank = stats.is_blank and not chunk.text.strip()
        sha256.update(chunk.text.encode("utf-8"))
    stats.sha256 = sha256.hexdigest()
    return stats


def split_lines(parts: Iterable[AnyStr], newline: AnyStr) -> Iterator[AnyStr]:
    """Lines with their newlines.

    A line longer than MAX_LINE_LENGTH is truncated to a prefix, which is too long as well.
    """
    kept: list[AnyStr] = []
    length = 0
    for part in parts:
        lines = part.split(newline)
        last = lines.pop()
        for line in lines:
            yield newline[:0].join(kept) + line + newline
            kept, length = [], 0
        if last and length <= MAX_LINE_LENGTH:
            kept.append(last)
            length += len(last)
    if length:
        yield newline[:0].join(kept)


def describe_decode_error(
    part: InputPart, error: UnicodeError, data: bytes, before: int
) -> tuple[str, str]:
    """Problem and hint for `data`, after `before` bytes of a file, that is not in its encoding."""
    encoding = part.text_format.encoding
    problem = f"not {encoding}: {error}"
    if isinstance(error, UnicodeDecodeError):
        byte, offset = error.object[error.start], before + error.start
        problem = f"not {encoding}: byte 0x{byte:02x} at offset {offset}"
    name = codecs.lookup(parse_encoding(encoding)[0]).name
    if not before and (found := _known_binary(data)):
        return f"{found}, not text", EXTRACT_HINT
    if b"\0" in data and not name.startswith(("utf-16", "utf-32")):
        problem += ", and NUL bytes as well: this is a binary file or UTF-16"
        return problem, "give its text, or try --encoding utf-16"
    if name == "utf-8":
        return problem, _not_utf8_hint(part.source)
    other = "give --encoding utf-16-le or utf-16-be" if name == "utf-16" else "give the right one"
    return problem, f"leave --encoding out if it is UTF-8, or {other}"


def _known_binary(data: bytes) -> str:
    """What a file that begins with these bytes is, if it is known to be no text; else empty."""
    if data.startswith(TAR_MAGIC, TAR_MAGIC_OFFSET):
        return "a tar archive"
    return next((kind for magic, kind in BINARY_BY_MAGIC.items() if data.startswith(magic)), "")


def _not_utf8_hint(source: Source) -> str:
    """Guess the encoding: damaged UTF-8 has many valid sequences beyond ASCII, others have few."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    invalid = valid = searched = 0
    has_c1 = False  # C1 control codes, printable only in cp1252
    for block in InputPart(source).read_blocks():
        text = decoder.decode(block)
        replaced = text.count("\ufffd")
        invalid += replaced
        valid += len(text) - len(text.encode("ascii", "ignore")) - replaced
        has_c1 |= any(byte in block for byte in range(0x80, 0xA0))
        searched += len(block)
        if searched >= MAX_SNIFF_BYTES:
            break
    replace = "--encoding utf-8:replace replaces them with U+FFFD"
    if valid >= max(1, invalid):
        count = "1 such place" if invalid <= 1 else f"{invalid:,} such places"
        return f"everything else is UTF-8, with {count}: correct them, or {replace}"
    other = "cp1252" if has_c1 else "latin-1"
    return f"give its encoding, such as --encoding {other}, or, if the bytes are damaged, {replace}"
