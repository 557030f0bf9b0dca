"""Texts in JSON lines and arrays: a field of each object, or the joined messages of a chat."""

import codecs
import contextlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from gptforge.data.input_errors import BadInput
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.text_io import (
    BOM,
    MAX_LINE_LENGTH,
    REPLACED_NOTICE,
    InputPart,
    TextFormat,
    describe_decode_error,
    parse_encoding,
    split_lines,
)
from gptforge.errors import error_reason
from gptforge.printable import join_first, printable

DEFAULT_FIELD = "text"
CHAT_FIELDS = ("messages", "conversations", "conversation")  # read if there is no field "text"
CHAT_NOTICE = "joined the messages of each chat as 'role: content', with a blank line between"
MAX_LISTED_FIELDS = 8
PEEK_RECORDS = 20  # searched for the field if a record lacks it
FIELD_HINT = "choose one with --field"
MAX_ELEMENT_CHARS = 64 * 2**20  # per array element: several copies must fit into memory
JSON_WHITESPACE = " \t\r\n"
NON_SPACE = re.compile(f"[^{JSON_WHITESPACE}]")


def read_json(part: InputPart) -> Iterator[str]:
    """The texts of JSON lines, or of the objects in an array."""
    for place, record in _records(part):
        try:
            if isinstance(record, BadInput):
                raise record
            yield text_from_record(record, part)
        except BadInput as bad:
            if FIELD_HINT in bad.hint and _has_field_elsewhere(part):
                # Do not suggest another `--field` if only this record lacks the field.
                hint = "other objects have it: correct or remove this one"
                bad = BadInput(bad.problem, hint=hint)
            if isinstance(place, int):
                # Lines are counted only for errors, by reading the file again.
                before = InputPart(part.source, stop=place).read_blocks()
                number = 1 + sum(block.count(b"\n") for block in before)
                place = f"line {number}"
            part.bad_input.handle(bad, f"{part.source.name}, {place}")


def _records(part: InputPart) -> Iterator[tuple[int | str, Any]]:
    """Each record, or the BadInput that it is, with its place: a line's first byte, or its name."""
    is_array = part.start == 0 and is_json_array(part.source, part.text_format)
    return _array_elements(part) if is_array else _line_records(part)


def _line_records(part: InputPart) -> Iterator[tuple[int, Any]]:
    source, encoding, offset = part.source, part.text_format.encoding, part.start
    if codecs.decode(b"\n", parse_encoding(encoding)[0], "replace") != "\n":
        problem = f"JSON lines cannot be split in {encoding}"
        raise BadInput(problem, source.name, "save it as UTF-8")
    for line in split_lines(part.read_blocks(), b"\n"):
        if not line.isspace():
            try:
                record = _parse_line(line, part)
            except BadInput as bad:
                record = bad
            yield offset, record
        offset += len(line)


def _parse_line(line: bytes, part: InputPart) -> Any:
    if len(line) > MAX_LINE_LENGTH:
        problem = f"longer than {MAX_LINE_LENGTH // 2**20} MB"
        raise BadInput(problem, hint="divide it into documents")
    encoding = part.text_format.encoding
    try:
        text = line.decode(*parse_encoding(encoding)).removeprefix(BOM)
        if "\ufffd" in text and encoding.endswith(":replace"):
            part.note(REPLACED_NOTICE)
        return json.loads(text)
    except UnicodeError as error:
        problem, hint = describe_decode_error(part, error, line, 0)
        raise BadInput(problem, hint="save it as UTF-8" if b"\0" in line else hint) from None
    except Exception as error:
        raise BadInput("not JSON", hint=_json_hint(part.source, error)) from None


def _json_hint(source: Source, error: Exception) -> str:
    # Bytes, not text: what cannot be decoded was reported before.
    first = next(InputPart(source).read_blocks(), b"").lstrip()
    if source.path.suffix == ".json" and first.startswith(b"{") and b"\n" in first:
        return (
            "one object a line is read, or one array of objects; of a single object over many "
            f"lines, save the list of its texts ({error_reason(error)})"
        )
    return f"fix it, one object a line ({error_reason(error)})"


def is_json_array(source: Source, text_format: TextFormat) -> bool:
    """Whether the first character of a file is the bracket that opens an array."""
    with contextlib.suppress(BadInput, OSError):  # reported when the file is read
        for chunk in InputPart(source, text_format).read_chunks():
            if text := chunk.text.lstrip(JSON_WHITESPACE):
                return text.startswith("[")
    return False


def _has_field_elsewhere(part: InputPart) -> bool:
    """Whether any of the first objects of the file has text in the field."""
    with contextlib.suppress(BadInput):  # reported when it is read
        records = _records(InputPart(part.source, part.text_format))
        for _, record in islice(records, PEEK_RECORDS):
            if isinstance(record, dict):
                field = find_field(record, part.text_format.field)
                if is_text(record.get(field)):
                    return True
    return False


def _array_elements(part: InputPart) -> Iterator[tuple[str, Any]]:
    """Parse a JSON array in constant memory."""
    decode, name = json.JSONDecoder().raw_decode, part.source.name
    expected, text, number, enough = "[", "", 0, 0
    for chunk in chain(part.read_chunks(), [None]):
        text += chunk.text if chunk else ""
        if chunk and len(text) < enough:
            continue
        position = enough = 0
        while match := NON_SPACE.search(text, position):
            position = match.start()
            if expected == "element" or (expected == "first element or ]" and match[0] != "]"):
                rest = len(text) - position
                try:
                    value, end = decode(text, position)
                except Exception as error:
                    # It may continue in the next chunk; doubling keeps the total cost linear.
                    if chunk and isinstance(error, ValueError) and rest <= MAX_ELEMENT_CHARS:
                        enough = 2 * rest
                        break
                    hint = f"correct it ({error_reason(error)})"
                    raise BadInput("not JSON", f"{name}, element {number + 1}", hint) from None
                if chunk and end == len(text):
                    break  # a number at the end of a chunk may continue in the next one
                number += 1
                yield f"element {number}", value
                position, expected = end, ", or ]"
                continue
            if expected == "end" or (expected == ", or ]" and match[0] not in ",]"):
                problem = "text after the array" if expected == "end" else "not JSON: no comma"
                hint = "one array of objects is read, or one object a line"
                raise BadInput(problem, f"{name}, after element {number}", hint)
            expected = {"[": "first element or ]", ",": "element", "]": "end"}[match[0]]
            position += 1
        text = text[position:] if match else ""
    if expected != "end":
        hint = "the file was truncated: download it again, or add what is missing"
        problem = "the array has no end: no ] after the last element"
        raise BadInput(problem, name, hint)


def text_from_record(record: Any, part: InputPart) -> str:
    """The text of a JSON object; a BadInput without one has a hint that names the fields it has."""
    field = part.text_format.field
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(record), "a number")
        hint = f'give objects with a field \'{field}\': {{"{field}": "..."}}'
        raise BadInput(f"{kind}, not an object", hint=hint)
    found = find_field(record, field)
    if found and isinstance(record[found], str):
        return str(record[found])  # the usual case, without building the hint
    texts = [name for name, value in record.items() if is_text(value)]
    hint = available_fields_hint(list(record), texts)
    if not found:
        raise BadInput(f"no field '{field}'", hint=hint)
    return text_from_value(record[found], found, part, hint)


def find_field(names: Collection[str], field: str) -> str:
    """The field to read: `field`, or, if that is the default, a chat's; empty if there is none."""
    candidates = (field, *CHAT_FIELDS) if field == DEFAULT_FIELD else (field,)
    return next((name for name in candidates if name in names), "")


def text_from_value(value: Any, field: str, part: InputPart, hint: str = "") -> str:
    """The text in the value of a field, a string or a chat; a BadInput with `hint` if neither."""
    if isinstance(value, str):
        return value
    if value is None:
        raise BadInput(f"field '{field}' is null", hint="fill it in")
    if not isinstance(value, list):
        problem = f"field '{field}' is not text but of type {type(value).__name__}"
        raise BadInput(problem, hint=hint)
    chat = _join_chat(value)
    if chat is None:
        hint = f"the messages of a chat have a role and a content that is text; {hint}"
        raise BadInput(f"field '{field}' is a list, but not a chat of texts", hint=hint)
    part.note(CHAT_NOTICE)
    return chat


def is_text(value: Any) -> bool:
    """Whether the value of a field is text: a string, or a chat."""
    return isinstance(value, str) or (isinstance(value, list) and _join_chat(value) is not None)


def available_fields_hint(names: Sequence[str], texts: Sequence[str]) -> str:
    """The hint for a missing field: which of the existing ones contain text."""
    if texts:
        return f"it has {_join_names(texts)}: {FIELD_HINT}"
    return f"none of its fields ({_join_names(names)}) is text" if names else "it has no fields"


def _join_names(names: Sequence[str]) -> str:
    return join_first([printable(name, 40) for name in names], MAX_LISTED_FIELDS)


def _join_chat(messages: Sequence[Any]) -> str | None:
    """The messages as one text; None if it is not a chat, or contains more than text."""
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        # OpenAI's keys, and ShareGPT's.
        role = message.get("role") or message.get("from")
        content = message.get("content") if "content" in message else message.get("value")
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            strings = [text for text in texts if isinstance(text, str)]
            content = "".join(strings) if len(strings) == len(texts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append(f"{role}: {content}")
    return "\n\n".join(turns) if turns else None
