"""The text of a record: a field of its own, or the messages of a chat, joined."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.text_io import (
    MAX_LINE_BYTES,
    REPLACED_NOTICE,
    TextFormat,
    describe_decode_error,
    parse_encoding,
    read_blocks,
    read_chunks,
)
from gptforge.errors import error_reason
from gptforge.printable import printable

DEFAULT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations", "conversation")
"""Fields that hold a chat in the data sets of others; read where there is no field "text"."""
CHAT_NOTICE = "joined the messages of each chat as 'role: content', with a blank line between"
MAX_LISTED_FIELDS = 8
"""Fields that a message names."""


def find_field(names: Sequence[str], field: str) -> str:
    """The field to read: the one asked for, or that of a chat; empty if neither is there."""
    if field in names:
        return field
    chats = CHAT_FIELDS if field == DEFAULT_FIELD else ()
    return next((name for name in chats if name in names), "")


def text_from_record(record: Any, field: str) -> tuple[str, bool]:
    """The text of a JSON object, and whether it was joined from the messages of a chat.

    Raises:
        BadInput: if it has no such text; the message says which fields it has.
    """
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(record), "a number")
        what = f"{kind} and no object"
        raise BadInput(what, "", f'give objects with a field \'{field}\': {{"{field}": "..."}}')
    found = find_field(list(record), field)
    texts = [name for name, value in record.items() if is_text(value)]
    if not found:
        raise BadInput(f"no field '{field}'", "", available_fields_hint(list(record), texts))
    return text_from_value(record[found], found, available_fields_hint(list(record), texts))


def text_from_value(value: Any, field: str, remedy: str) -> tuple[str, bool]:
    """The same, of what a field holds."""
    if isinstance(value, str):
        return value, False
    if not isinstance(value, list):
        what = f"field '{field}' is no text but of type {type(value).__name__}"
        raise BadInput(what, "", remedy)
    chat = _join_chat(value)
    if chat is None:
        what = f"field '{field}' is a list, and no chat of texts"
        raise BadInput(
            what, "", f"a chat's messages have a role and a content that is text; {remedy}"
        )
    return chat, True


def is_text(value: Any) -> bool:
    """Whether a field's value can be learned: a string, or a chat."""
    return isinstance(value, str) or (isinstance(value, list) and _join_chat(value) is not None)


def available_fields_hint(names: Sequence[str], texts: Sequence[str]) -> str:
    """The remedy for a field that is not there: which of those that are could be read."""
    if texts:
        return f"it has {_join_names(texts)}: choose one with --field"
    return f"none of its fields ({_join_names(names)}) is text" if names else "it has no fields"


def _join_names(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_LISTED_FIELDS else ""
    return ", ".join(printable(name, 40) for name in names[:MAX_LISTED_FIELDS]) + more


def _join_chat(messages: Sequence[Any]) -> str | None:
    """The messages as one text; None if they are no chat, or hold something else than text."""
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        # OpenAI's names, and ShareGPT's.
        role = message.get("role") or message.get("from")
        content = message.get("content") if "content" in message else message.get("value")
        if isinstance(content, list):
            content = _join_content(content)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        parts.append(f"{role}: {content}")
    return "\n\n".join(parts) if parts else None


def _join_content(parts: Sequence[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else None


MAX_ELEMENT_CHARS = 64 * 2**20
"""Characters of an element: one must fit into memory several times."""
JSON_WHITESPACE = " \t\r\n"


def is_json_array(source: Source, encoding: str) -> bool:
    """Whether a file's first character is the bracket that opens an array."""
    try:
        for chunk in read_chunks(source, encoding=encoding):
            if text := chunk.text.lstrip(JSON_WHITESPACE):
                return text.startswith("[")
    except BadInput:
        # Whoever reads it says where.
        pass
    return False


def array_elements(source: Source, encoding: str, notices: set[str]) -> Iterator[tuple[Any, int]]:
    """The elements, and how many bytes of the file were read up to each.

    Raises:
        BadInput: where it is not JSON.
    """
    decode = json.JSONDecoder().raw_decode
    number, needed, expected, text = 0, 0, "[", ""
    waiting: list[str] = []
    for more, reached, is_end in _chunks_and_end(source, encoding, notices):
        waiting.append(more)
        needed -= len(more)
        if needed > 0 and not is_end:
            continue
        text, at, waiting = "".join([text, *waiting]), 0, []
        while (at := _skip_whitespace(text, at)) < len(text):
            mark, where = text[at], f"{source.name}, behind element {number}"
            if expected == "[" or mark == {"comma": ",", "first": "]"}.get(expected):
                expected = {"[": "first", "first": "end", "comma": "element"}[expected]
                at += 1
            elif expected == "comma" and mark == "]":
                expected, at = "end", at + 1
            elif expected in ("comma", "end"):
                what = "text behind the array" if expected == "end" else "not JSON: no comma"
                raise BadInput(what, where, "one array of objects is read, or one object a line")
            else:
                try:
                    value, stop = decode(text, at)
                except Exception as error:
                    may_go_on = (
                        isinstance(error, ValueError) and len(text) - at <= MAX_ELEMENT_CHARS
                    )
                    if may_go_on and not is_end:
                        # It may go on behind what was read; twice as much is tried next.
                        needed = len(text) - at
                        break
                    where = f"{source.name}, element {number + 1}"
                    raise BadInput(
                        "not JSON", where, f"correct it ({error_reason(error)})"
                    ) from None
                if stop == len(text) and not is_end:
                    # So may a number.
                    break
                number, at, expected = number + 1, stop, "comma"
                yield value, reached
        text = text[at:]
    if expected != "end":
        what = "the array has no end: no ] behind the last element"
        raise BadInput(
            what, source.name, "the file was cut off: fetch it again, or add what is missing"
        )


def _skip_whitespace(text: str, at: int) -> int:
    while at < len(text) and text[at] in JSON_WHITESPACE:
        at += 1
    return at


def _chunks_and_end(
    source: Source, encoding: str, notices: set[str]
) -> Iterator[tuple[str, int, bool]]:
    reached = 0
    for chunk in read_chunks(source, encoding=encoding):
        reached = chunk.bytes_read
        if chunk.has_replacements:
            notices.add(f"{source.name}: {REPLACED_NOTICE}")
        yield chunk.text, reached, False
    yield "", reached, True


def read_json_array(
    source: Source, form: TextFormat, skipped: BadInputHandler, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    number = 0
    try:
        for record, reached in array_elements(source, form.encoding, skipped.notices):
            number += 1
            try:
                yield _record_text(record, form, source, skipped), reached
            except BadInput as bad:
                where = f"{source.name}, element {number}"
                skipped.handle(BadInput(bad.problem, where, bad.hint))
    except BadInput as bad:
        skipped.handle(bad)


def read_json_lines(
    source: Source, form: TextFormat, skipped: BadInputHandler, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    at = start
    if not _is_line_based(form.encoding):
        what = f"JSON lines cannot be told apart in {form.encoding}"
        skipped.handle(BadInput(what, source.name, "save it as UTF-8"))
        return
    try:
        for line, reached in _read_lines(source, start, stop):
            begin, at = at, at + len(line)
            if line.isspace():
                continue
            try:
                yield (
                    _record_text(_parse_line(line, form, source, skipped), form, source, skipped),
                    reached,
                )
            except BadInput as bad:
                where = f"{source.name}, line {_line_number(source, begin)}"
                skipped.handle(BadInput(bad.problem, where, bad.hint))
    except BadInput as bad:
        skipped.handle(bad)


def _is_line_based(encoding: str) -> bool:
    """Whether the byte of a line feed is one in this encoding, and stands alone."""
    try:
        return b"\n".decode(parse_encoding(encoding)[0]) == "\n"
    except UnicodeError:
        return False


def _parse_line(line: bytes, form: TextFormat, source: Source, skipped: BadInputHandler) -> Any:
    if len(line) > MAX_LINE_BYTES:
        raise BadInput(f"longer than {MAX_LINE_BYTES // 2**20} MB", "", "divide it into documents")
    try:
        text = line.decode(*parse_encoding(form.encoding)).removeprefix("\ufeff")
        if "\ufffd" in text and form.encoding.endswith(":replace"):
            skipped.notices.add(f"{source.name}: {REPLACED_NOTICE}")
        return json.loads(text)
    except UnicodeError as error:
        what, remedy = describe_decode_error(form.encoding, error, line, source=source)
        raise BadInput(what, "", "save it as UTF-8" if b"\0" in line else remedy) from None
    except Exception as error:
        raise BadInput("not JSON", "", _json_hint(source, error)) from None


def _json_hint(source: Source, error: Exception) -> str:
    # A NUL of a file in UTF-16 is told of elsewhere.
    first = next((block for block, _ in read_blocks(source)), b"").lstrip()
    if source.path.suffix == ".json" and first.startswith(b"{") and b"\n" in first:
        return (
            "one object a line is read, or one array of objects; of a single object over many "
            f"lines, save the list of its texts ({error_reason(error)})"
        )
    return f"mend it, one object a line ({error_reason(error)})"


def _record_text(record: Any, form: TextFormat, source: Source, skipped: BadInputHandler) -> str:
    text, is_chat = text_from_record(record, form.field)
    if is_chat:
        skipped.notices.add(f"{source.name}: {CHAT_NOTICE}")
    return text


def _read_lines(source: Source, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    """Lines with their line feeds. Of one that is too long, a part that is too long as well."""
    kept: list[bytes] = []
    length = reached = 0
    for block, reached in read_blocks(source, start, stop):
        first, feed, rest = block.partition(b"\n")
        if length <= MAX_LINE_BYTES:
            kept.append(first + feed)
        length += len(first) + len(feed)
        if not feed:
            continue
        yield b"".join(kept), reached
        *whole, last = rest.split(b"\n")
        for line in whole:
            yield line + b"\n", reached
        kept, length = [last], len(last)
    if length:
        yield b"".join(kept), reached


def _line_number(source: Source, offset: int) -> int:
    """Lines are counted only when one is to be named."""
    return 1 + sum(block.count(b"\n") for block, _ in read_blocks(source, 0, offset))
