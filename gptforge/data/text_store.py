"""Texts in memory, as a file that `--input` names."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from gptforge.data.cache import SPOOL_PREFIX, TEXT_PREFIX, writable_cache
from gptforge.errors import UserError
from gptforge.printable import short_repr

Texts = str | Iterable[str] | Iterable[Mapping[str, object]]


def store_texts(texts: Texts, *, field: str) -> Path:
    """Write texts to a file of the cache that is named after its content, so that a run resumes.

    Args:
        texts: one text, or documents: strings, or rows with a column `field` such as those of a
            Hugging Face dataset. A generator is read once.
        field: the column, and the field of the JSON lines that hold the documents.

    Raises:
        UserError: for anything else, and if there is no text.
    """
    suffix, lines = "jsonl", _json_lines(texts, field)
    if isinstance(texts, str):
        suffix, lines = "txt", iter([texts])
        # Path.is_file raises an OSError for a text that is too long for a path.
        if "\n" not in texts and os.path.isfile(texts):  # noqa: PTH113
            raise UserError(f"text is the path of a file, {texts}: give it as input")
    cache, digest = writable_cache(), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=cache) as folder:
        partial = Path(folder) / "text"
        with partial.open("wb") as file:
            for number, line in enumerate(lines):
                try:
                    data = line.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"text: document {number} is not valid text: {error}") from None
                digest.update(data)
                file.write(data)
            if not file.tell():
                raise UserError("text is empty: give a string or documents")
        path = cache / f"{TEXT_PREFIX}{digest.hexdigest()[:16]}.{suffix}"
        partial.replace(path)
    return path


def _json_lines(texts: Iterable[object], field: str) -> Iterator[str]:
    if isinstance(texts, bytes | os.PathLike) or not isinstance(texts, Iterable):
        raise UserError(f"text takes strings or a dataset, not {short_repr(texts)}")
    # Iterating over a DatasetDict or a DataFrame would give the names of its parts.
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        names = ", ".join(map(repr, texts))
        kind = type(texts).__name__
        raise UserError(f"text is a {kind} of {names}: give one of them, as text=data[NAME]")
    for number, row in enumerate(texts):
        if isinstance(row, Mapping) and field not in row:
            names = ", ".join(map(repr, row))
            raise UserError(f"text has no column {field!r}, but {names}: name one with field")
        text = row[field] if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise UserError(f"text: document {number} is {short_repr(text)}, not a string")
        yield json.dumps({field: text}, ensure_ascii=False) + "\n"
