"""The text of a record: a field of its own, or the messages of a chat, joined."""

from collections.abc import Sequence
from typing import Any

from gptforge.data.bad import BadInput
from gptforge.printable import printable

DEFAULT = "text"
CHATS = ("messages", "conversations", "conversation")
"""Fields that hold a chat in the data sets of others; read where there is no field "text"."""
HOW_JOINED = "joined the messages of each chat as 'role: content', with a blank line between"
MAX_FIELDS = 8
"""Fields that a message names."""


def field_in(names: Sequence[str], field: str) -> str:
    """The field to read: the one asked for, or that of a chat; empty if neither is there."""
    if field in names:
        return field
    chats = CHATS if field == DEFAULT else ()
    return next((name for name in chats if name in names), "")


def text_of(record: Any, field: str) -> tuple[str, bool]:
    """The text of a JSON object, and whether it was joined from the messages of a chat.

    Raises:
        BadInput: if it has no such text; the message says which fields it has.
    """
    if not isinstance(record, dict):
        kind = {list: "a list", str: "a string", type(None): "null"}.get(type(record), "a number")
        what = f"{kind} and no object"
        raise BadInput(what, "", f'give objects with a field \'{field}\': {{"{field}": "..."}}')
    found = field_in(list(record), field)
    texts = [name for name, value in record.items() if is_text(value)]
    if not found:
        raise BadInput(f"no field '{field}'", "", which_fields(list(record), texts))
    return value_of(record[found], found, which_fields(list(record), texts))


def value_of(value: Any, field: str, remedy: str) -> tuple[str, bool]:
    """The same, of what a field holds."""
    if isinstance(value, str):
        return value, False
    if not isinstance(value, list):
        what = f"field '{field}' is no text but of type {type(value).__name__}"
        raise BadInput(what, "", remedy)
    chat = _joined(value)
    if chat is None:
        what = f"field '{field}' is a list, and no chat of texts"
        raise BadInput(
            what, "", f"a chat's messages have a role and a content that is text; {remedy}"
        )
    return chat, True


def is_text(value: Any) -> bool:
    """Whether a field's value can be learned: a string, or a chat."""
    return isinstance(value, str) or (isinstance(value, list) and _joined(value) is not None)


def which_fields(names: Sequence[str], texts: Sequence[str]) -> str:
    """The remedy for a field that is not there: which of those that are could be read."""
    if texts:
        return f"it has {_listed(texts)}: choose one with --field"
    return f"none of its fields ({_listed(names)}) is text" if names else "it has no fields"


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_FIELDS else ""
    return ", ".join(printable(name, 40) for name in names[:MAX_FIELDS]) + more


def _joined(messages: Sequence[Any]) -> str | None:
    """The messages as one text; None if they are no chat, or hold something else than text."""
    parts = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        # OpenAI's names, and ShareGPT's.
        role = message.get("role") or message.get("from")
        content = message.get("content") if "content" in message else message.get("value")
        if isinstance(content, list):
            content = _text_parts(content)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        parts.append(f"{role}: {content}")
    return "\n\n".join(parts) if parts else None


def _text_parts(parts: Sequence[Any]) -> str | None:
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    whole = [text for text in texts if isinstance(text, str)]
    return "".join(whole) if len(whole) == len(texts) else None
