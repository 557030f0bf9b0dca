"""Files to text: decompressed, decoded and normalized block by block, in constant memory."""

import codecs
import gzip
import importlib
import importlib.util
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, AnyStr, cast

from gptforge.data.input_errors import BadInput
from gptforge.data.prepare.sources import Source
from gptforge.errors import UserError

# Large strings that alternate between one, two and four bytes per character fragment the heap of
# the C library, which then grows with the text; small ones hardly do.
BLOCK_BYTES = 2**15
MAX_LINE_LENGTH = 64 * 2**20  # per line or document: several copies must fit into memory
MAX_SNIFF_BYTES = 2**26  # searched to guess the encoding of a file
BOM = "\ufeff"
HAS_STDLIB_ZSTD = importlib.util.find_spec("compression") is not None  # Python 3.14 and later
REPLACED_NOTICE = "replaced bytes that are not in the encoding with U+FFFD"


def parse_encoding(encoding: str) -> tuple[str, str]:
    """Codec and error handler of an `--encoding` such as `utf-8:replace`."""
    name, _, errors = encoding.partition(":")
    return name, errors or "strict"


@dataclass(frozen=True)
class TextFormat:
    """How to find the text in a file.

    Attributes:
        field: of a JSON object, or column of a table.
        encoding: codec, optionally with `:replace` for undecodable bytes.
        split_on: separator between the documents of a text file; empty: the file is one document.
    """

    field: str = "text"
    encoding: str = "utf-8"
    split_on: str = ""

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
    """Part of a file's text.

    Attributes:
        offset: first byte in the decompressed file.
        raw: as decoded; it never ends between CR and LF.
        text: `raw` with CRLF turned into LF, and without a byte order mark.
        bytes_read: bytes of the file on disk that were read so far.
        has_replacements: whether undecodable bytes became U+FFFD.
    """

    offset: int
    raw: str
    text: str
    bytes_read: int
    has_replacements: bool = False


def read_blocks(
    source: Source, start: int = 0, stop: int | None = None
) -> Iterator[tuple[bytes, int]]:
    """Decompressed bytes from `start` to `stop`, each block with the bytes read of the file so far.

    Raises:
        BadInput: for a damaged compressed file.
        UserError: if the package that decompresses it is missing.
    """
    damage: tuple[type[Exception], ...] = (
        EOFError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        zlib.error,
    )
    if source.compression == "zst":
        damage += (_zstd_module(source).ZstdError,)
    try:
        with source.path.open("rb") as disk:
            file = _decompressed(source, disk)
            if start:
                file.seek(start)
            position = start
            end = sys.maxsize if stop is None else stop
            while block := file.read(min(BLOCK_BYTES, end - position)):
                position += len(block)
                yield block, disk.tell() - start if source.compression else position - start
    except damage as error:
        problem = f"damaged .{source.compression} ({error})"
        raise BadInput(problem, source.name, "download it again") from error
    except FileNotFoundError:
        raise UserError(f"{source.name}: the file no longer exists") from None


def _decompressed(source: Source, disk: IO[bytes]) -> IO[bytes]:
    if source.compression == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=disk, mode="rb"))
    if source.compression == "xz":
        return lzma.LZMAFile(disk, "rb")
    if source.compression == "zst":
        module = _zstd_module(source)
        reader = module.ZstdFile(disk, "rb") if HAS_STDLIB_ZSTD else _ZstdReader(module, disk)
        return cast(IO[bytes], reader)
    return disk


def _zstd_module(source: Source) -> Any:
    try:
        return importlib.import_module("compression.zstd" if HAS_STDLIB_ZSTD else "zstandard")
    except ImportError:
        raise UserError(
            f"{source.name}: .zst needs the package zstandard: pip install zstandard"
        ) from None


class _ZstdReader:
    """Reads all frames; unlike zstandard's stream_reader, raises EOFError for a truncated file."""

    def __init__(self, module: Any, disk: IO[bytes]) -> None:
        self._new_frame = module.ZstdDecompressor().decompressobj
        self._disk, self._frame = disk, None
        self._compressed = self._ready = b""
        self._consumed = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        while len(self._ready) - self._consumed < size:
            # In small blocks: the ratio of a malicious or repetitive file is unbounded.
            self._compressed = self._compressed or self._disk.read(2**14)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file is truncated")
                break
            frame = self._frame = self._frame or self._new_frame()
            self._ready = self._ready[self._consumed :] + frame.decompress(self._compressed)
            self._consumed = 0
            self._compressed = frame.unused_data if frame.eof else b""
            if frame.eof:
                self._frame = None
        part = self._ready[self._consumed : self._consumed + size]
        self._consumed += len(part)
        return part


def read_chunks(
    source: Source,
    *,
    encoding: str = "utf-8",
    start: int = 0,
    stop: int | None = None,
    notices: set[str] | None = None,
) -> Iterator[Chunk]:
    """The text of a file, or of its bytes from `start` to `stop`, in chunks.

    Args:
        source: the file.
        encoding: as in `TextFormat`.
        start: first byte of the decompressed file.
        stop: one past the last byte; None: the end.
        notices: gets a notice if undecodable bytes were replaced.

    Raises:
        BadInput: at the first byte that is not text in this encoding.
    """
    codec, errors = parse_encoding(encoding)
    decoder = codecs.getincrementaldecoder(codec)(errors)
    read, undecoded, kept = start, 0, ""
    blocks, block, bytes_read = read_blocks(source, start, stop), b" ", 0
    while block:
        # An empty block at the end finalizes the decoder.
        block, bytes_read = next(blocks, (b"", bytes_read))
        offset = read - undecoded - len(kept)
        try:
            raw = kept + decoder.decode(block, final=not block)
        except UnicodeError as error:
            problem, hint = describe_decode_error(
                encoding, error, block, before=read - undecoded, source=source
            )
            raise BadInput(problem, source.name, hint) from None
        read += len(block)
        undecoded = len(decoder.getstate()[0])
        # Keep back a CR, since an LF may follow.
        kept = "\r" if raw.endswith("\r") and block else ""
        raw = raw[: len(raw) - len(kept)]
        if "\0" in raw:
            position = offset + len(raw[: raw.index("\0")].encode(codec, "replace"))
            if errors == "replace" and b"\0" in block:
                position = read - len(block) + block.index(b"\0")
            problem = f"NUL byte at offset {position}: this is a binary file or UTF-16"
            hint = "save it as text, or, if it is UTF-16, give --encoding utf-16"
            raise BadInput(problem, source.name, hint)
        if raw:
            text = (raw.removeprefix(BOM) if offset == 0 else raw).replace("\r\n", "\n")
            has_replacements = errors == "replace" and "\ufffd" in raw
            if has_replacements and notices is not None:
                notices.add(f"{source.name}: {REPLACED_NOTICE}")
            yield Chunk(offset, raw, text, bytes_read, has_replacements)


def split_lines(
    parts: Iterable[tuple[AnyStr, int]], newline: AnyStr
) -> Iterator[tuple[AnyStr, int]]:
    """Lines with their newlines, and the number that came with the part in which each ends.

    A line longer than MAX_LINE_LENGTH is truncated to a prefix, which is too long as well.
    """
    empty = newline[:0]
    kept: list[AnyStr] = []
    length = number = 0
    for part, number in parts:
        first, end, rest = part.partition(newline)
        if length <= MAX_LINE_LENGTH:
            kept.append(first + end)
        length += len(first) + len(end)
        if not end:
            continue
        yield empty.join(kept), number
        lines = rest.split(newline)
        last = lines.pop()
        for line in lines:
            yield line + newline, number
        kept, length = [last], len(last)
    if length:
        yield empty.join(kept), number


def describe_fixes(chunk: Chunk) -> set[str]:
    """Describe what was normalized in a chunk."""
    fixes = set()
    if chunk.offset == 0 and chunk.raw.startswith(BOM):
        fixes.add("dropped the byte order mark")
    if "\r\n" in chunk.raw:
        fixes.add("turned CRLF line ends into LF")
    if chunk.has_replacements:
        fixes.add(REPLACED_NOTICE)
    return fixes


def describe_decode_error(
    encoding: str, error: UnicodeError, data: bytes, *, before: int = 0, source: Source
) -> tuple[str, str]:
    """Problem and hint for bytes that are not in an encoding.

    Args:
        encoding: the encoding that `data` was decoded with.
        error: the exception.
        data: the bytes.
        before: bytes of the file in front of `data`.
        source: the file.
    """
    problem = f"not {encoding}: {error}"
    if isinstance(error, UnicodeDecodeError):
        byte, offset = error.object[error.start], before + error.start
        problem = f"not {encoding}: byte 0x{byte:02x} at offset {offset}"
    name = codecs.lookup(parse_encoding(encoding)[0]).name
    if b"\0" in data and not name.startswith(("utf-16", "utf-32")):
        problem += ", and NUL bytes as well: this is a binary file or UTF-16"
        return problem, "give its text, or try --encoding utf-16"
    if name == "utf-8":
        return problem, _not_utf8_hint(source)
    other = "give --encoding utf-16-le or utf-16-be" if name == "utf-16" else "give the right one"
    return problem, f"leave --encoding out if it is UTF-8, or {other}"


def _not_utf8_hint(source: Source) -> str:
    """Guess the encoding: damaged UTF-8 has many valid sequences beyond ASCII, others have few."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    invalid = valid = searched = 0
    has_c1 = False  # C1 control codes, printable only in cp1252
    for block, _ in read_blocks(source):
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
