"""Tokenizers: GPT-2's or a user's own byte-level BPE, characters, bytes. One protocol, one JSON
form, and Hugging Face's tokenizer.json for a BPE.
"""

import json
from pathlib import Path
from typing import Any

from gptforge.errors import UserError, parsing
from gptforge.files import atomic_write, read_text
from gptforge.printable import short_repr
from gptforge.tokenizers.base import (
    Tokenizer,
    Tokens,
    byte_lengths,
    decode,
)
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

__all__ = ["NAMES", "Tokenizer", "Tokens", "byte_lengths", "decode", "from_name", "load", "save"]

FORMAT, VERSION = "gptforge-tokenizer", 1
NAMES = ("gpt2", "char", "byte")
"""What `--tokenizer` knows without a file."""


def from_name(name: str, text: str) -> Tokenizer:
    """The tokenizer that `--tokenizer` asks for; `text` gives the char tokenizer its alphabet.

    Raises:
        UserError: if `name` is neither a known name nor a file that `load` reads.
    """
    if name == "gpt2":
        return _gpt2(None)
    if name == "char":
        return CharTokenizer.from_text(text)
    if name == "byte":
        return ByteTokenizer()
    if not Path(name).is_file():
        raise UserError(
            f"--tokenizer {name}: neither gpt2, char or byte, nor the path of a tokenizer.json"
        )
    return load(Path(name))


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer down, whole."""
    record = {"format": FORMAT, "version": VERSION, **tokenizer.to_json()}
    if tokenizer.eot_token is not None:
        record["marks_documents"] = tokenizer.prepends_eot
    atomic_write(path, json.dumps(record, ensure_ascii=True) + "\n")


def load(path: Path) -> Tokenizer:
    """Read what `save` wrote, or `gptforge tokenizer train`.

    Raises:
        UserError: if the file is something else.
    """
    with parsing(path, "a tokenizer that can be used here"):
        record = json.loads(read_text(path))
        if isinstance(record, dict) and "model" in record:
            return _from_hf(record)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError("neither ours nor Hugging Face's form")
        if record.get("version") != VERSION:
            version = short_repr(record.get("version"))
            raise ValueError(f"version {version} of our form: {VERSION} is known here")
        tokenizer = _of_kind(record["kind"], record)
        # Files of earlier versions do not say it.
        if tokenizer.eot_token is not None and "marks_documents" in record:
            tokenizer.prepends_eot = record["marks_documents"] is True
        return tokenizer


def _of_kind(kind: object, record: dict[str, Any]) -> Tokenizer:
    if kind == "char":
        return CharTokenizer(str(record["alphabet"]), with_eot=record.get("marks") is True)
    if kind == "gpt2":
        return _gpt2([str(merge) for merge in record["merges"]])
    if kind == "byte":
        return ByteTokenizer(with_eot=record.get("marks") is True)
    raise ValueError(f"its kind is {short_repr(kind)}, which is not known here")


def _from_hf(record: dict[str, object]) -> Tokenizer:
    from gptforge.tokenizers.hf_loader import load_hf_tokenizer

    return load_hf_tokenizer(record)


def _gpt2(merges: list[str] | None) -> Tokenizer:
    # Imported here: it brings in tiktoken, which a character model does not need.
    from gptforge.tokenizers.gpt2 import GPT2Tokenizer

    return GPT2Tokenizer(merges)
