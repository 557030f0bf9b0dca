"""Bytes on the disk to text in pieces: unpacked, decoded, mended, in constant memory."""

import codecs
import gzip
import importlib
import importlib.util
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from gptforge.data.input_errors import BadInput
from gptforge.data.prepare.sources import Source
from gptforge.errors import UserError

BLOCK_BYTES = 2**15
"""Bytes read at a time. Strings of megabytes, of one, two and four bytes a character in turn, leave
holes in the C library's heap, which then grows with the text; those of small ones hardly matter."""
BOM = "\ufeff"
HAS_STDLIB_ZSTD = importlib.util.find_spec("compression") is not None
"""Python 3.14 brings it along."""


REPLACED_NOTICE = "put U+FFFD where bytes are not in the encoding"
MAX_SNIFF_BYTES = 2**26
"""Bytes of a file that are looked at to tell what it is written in."""


def parse_encoding(encoding: str) -> tuple[str, str]:
    """The name of a codec and what to do about bytes that are not in it: `utf-8:replace`."""
    name, _, errors = encoding.partition(":")
    return name, errors or "strict"


@dataclass(frozen=True)
class Chunk:
    """A piece of a file's text."""

    offset: int
    """Byte of the unpacked file where it begins."""
    raw: str
    """As decoded; it never ends between CR and LF."""
    text: str
    """With CRLF turned into LF, and without a byte order mark."""
    bytes_read: int
    """Bytes of the file on the disk that were read so far."""
    has_replacements: bool = False
    """Whether U+FFFD stands in it for bytes that are not in the encoding."""


def read_blocks(
    source: Source, start: int = 0, stop: int | None = None
) -> Iterator[tuple[bytes, int]]:
    """Unpacked bytes from `start` to `stop`, and how many bytes of the file were read for them.

    Raises:
        BadInput: for a damaged packed file.
        UserError: if the package that unpacks it is missing.
    """
    damage: tuple[type[Exception], ...] = (
        EOFError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        zlib.error,
        *_zstd_errors(source),
    )
    try:
        with source.path.open("rb") as disk:
            file = _unpacked(source, disk)
            if start:
                file.seek(start)
            position = start
            while block := file.read(
                BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)
            ):
                position += len(block)
                yield block, disk.tell() - start if source.compression else position - start
    except damage as error:
        what = f"damaged .{source.compression} ({error})"
        raise BadInput(what, source.name, "fetch it again") from error
    except FileNotFoundError:
        raise UserError(f"{source.name}: there is no such file any more") from None


def _unpacked(source: Source, disk: IO[bytes]) -> IO[bytes]:
    if source.compression == "gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=disk, mode="rb"))
    if source.compression == "xz":
        return lzma.LZMAFile(disk, "rb")
    if source.compression == "zst":
        module = _zstd(source)
        if HAS_STDLIB_ZSTD:
            return cast(IO[bytes], module.ZstdFile(disk, "rb"))
        return cast(IO[bytes], _ZstdReader(module, disk))
    return disk


class _ZstdReader:
    """Reads frame after frame, and tells a file that was cut off from one that ends."""

    def __init__(self, module: Any, disk: IO[bytes]) -> None:
        self._new_frame = module.ZstdDecompressor().decompressobj
        self._disk, self._frame = disk, None
        self._packed = self._ready = b""
        self._given = 0

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end."""
        while len(self._ready) - self._given < size:
            # Little at a time: a few bytes may stand for very many.
            self._packed = self._packed or self._disk.read(2**14)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle")
                break
            frame = self._frame = self._frame or self._new_frame()
            self._ready = self._ready[self._given :] + frame.decompress(self._packed)
            self._given = 0
            self._packed = frame.unused_data if frame.eof else b""
            if frame.eof:
                self._frame = None
        part = self._ready[self._given : self._given + size]
        self._given += len(part)
        return part


def _zstd(source: Source) -> Any:
    name = "compression.zstd" if HAS_STDLIB_ZSTD else "zstandard"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{source.name}: .zst needs the package zstandard: pip install zstandard"
        ) from None


def _zstd_errors(source: Source) -> tuple[type[Exception], ...]:
    return (_zstd(source).ZstdError,) if source.compression == "zst" else ()


def read_chunks(
    source: Source, *, encoding: str = "utf-8", start: int = 0, stop: int | None = None
) -> Iterator[Chunk]:
    """The text of a file, or of the bytes from `start` to `stop` of one, in pieces.

    Raises:
        BadInput: where it is not text in that encoding, with the byte.
    """
    codec, errors = parse_encoding(encoding)
    decoder = codecs.getincrementaldecoder(codec)(errors)
    read, held, kept = start, 0, ""
    for block, reached in _and_end(read_blocks(source, start, stop)):
        offset = read - held - len(kept)
        try:
            raw = kept + decoder.decode(block, final=not block)
        except UnicodeError as error:
            what, remedy = describe_decode_error(
                encoding, error, block, before=read - held, source=source
            )
            raise BadInput(what, source.name, remedy) from None
        read += len(block)
        held = len(decoder.getstate()[0])
        # CR waits for the LF that may follow.
        kept = "\r" if raw.endswith("\r") and block else ""
        raw = raw[: len(raw) - len(kept)]
        if "\0" in raw:
            place = offset + len(raw[: raw.index("\0")].encode(codec, "replace"))
            if errors == "replace" and b"\0" in block:
                place = read - len(block) + block.index(b"\0")
            what = f"NUL byte at offset {place}: this is a binary file or UTF-16"
            remedy = "save it as text, or, if it is UTF-16, give --encoding utf-16"
            raise BadInput(what, source.name, remedy)
        if raw:
            text = raw.removeprefix(BOM) if offset == 0 else raw
            is_replaced = errors == "replace" and "\ufffd" in raw
            yield Chunk(offset, raw, text.replace("\r\n", "\n"), reached, is_replaced)


def describe_decode_error(
    encoding: str, error: UnicodeError, part: bytes, *, before: int = 0, source: Source
) -> tuple[str, str]:
    """What is wrong with bytes that are not in an encoding, and what can be done.

    Args:
        encoding: the one that they were taken for.
        error: what decoding them met.
        part: the bytes.
        before: bytes in front of those that the error counts from.
        source: the file that they are of.
    """
    what = f"not {encoding}: {error}"
    if isinstance(error, UnicodeDecodeError):
        byte, place = error.object[error.start], before + error.start
        what = f"not {encoding}: byte 0x{byte:02x} at offset {place}"
    name = codecs.lookup(parse_encoding(encoding)[0]).name
    if b"\0" in part and not name.startswith(("utf-16", "utf-32")):
        what += ", and NUL bytes as well: this is a binary file or UTF-16"
        return what, "give its text, or try --encoding utf-16"
    if name == "utf-8":
        return what, _instead_of_utf8(source)
    other = "say --encoding utf-16-le or utf-16-be" if name == "utf-16" else "name the right one"
    return what, f"leave --encoding out if it is UTF-8, or {other}"


def _instead_of_utf8(source: Source) -> str:
    """What to do about a file that is not valid UTF-8: whether it is another encoding shows in how
    many characters beyond ASCII are valid all the same.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    bad = valid = looked = 0
    odd = False
    for block, _ in read_blocks(source):
        text = decoder.decode(block)
        replaced = text.count("\ufffd")
        bad += replaced
        valid += len(text) - len(text.encode("ascii", "ignore")) - replaced
        odd |= any(byte in block for byte in range(0x80, 0xA0))
        looked += len(block)
        if looked >= MAX_SNIFF_BYTES:
            break
    replace = "--encoding utf-8:replace puts U+FFFD in their place"
    if valid >= max(1, bad):
        count = "1 such place" if bad <= 1 else f"{bad:,} such places"
        return f"all else is UTF-8, with {count}: correct them, or {replace}"
    other = "cp1252" if odd else "latin-1"
    return f"say what it is with --encoding {other}, or, if such bytes are damage, {replace}"


def _and_end(parts: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """And an empty block behind the last: what is unfinished there will stay so."""
    reached = 0
    for block, reached in parts:
        yield block, reached
    yield b"", reached


def describe_fixes(chunk: Chunk) -> set[str]:
    """What was put right in it, in words."""
    found = set()
    if chunk.offset == 0 and chunk.raw.startswith(BOM):
        found.add("dropped the byte order mark")
    if "\r\n" in chunk.raw:
        found.add("turned CRLF line ends into LF")
    if chunk.has_replacements:
        found.add(REPLACED_NOTICE)
    return found


MAX_LINE_BYTES = 64 * 2**20
"""Bytes of a line, characters of a document: one must fit into memory several times."""


@dataclass(frozen=True)
class TextFormat:
    """How text is found in the files."""

    field: str = "text"
    """Of a JSON line, or column of a Parquet file, that holds the text."""
    encoding: str = "utf-8"
    split_on: str = ""
    """What stands between the documents of a text file; empty: each file is one."""

    def __post_init__(self) -> None:
        name, errors = parse_encoding(self.encoding)
        if errors not in ("strict", "replace"):
            raise UserError(f"--encoding {self.encoding}: only :replace may stand behind a name")
        try:
            "".encode(name)
        except (LookupError, UnicodeError):
            raise UserError(f"--encoding {self.encoding}: there is no such encoding") from None
