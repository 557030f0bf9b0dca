"""Tokenizers behind one protocol: byte-level BPE (GPT-2's or your own), characters, bytes.

All are saved in one JSON format; a BPE can also be read from Hugging Face's tokenizer.json.
"""

import json
from pathlib import Path
from typing import Any

from gptforge.errors import UserError, parsing
from gptforge.files import atomic_write, read_text
from gptforge.printable import short_repr
from gptforge.tokenizers.base import Tokenizer
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

__all__ = ["NAMES", "TEXT_DEPENDENT", "Tokenizer", "from_name", "load", "save"]

FORMAT, VERSION = "gptforge-tokenizer", 1
NAMES = ("gpt2", "char", "byte", "bpe")  # values of `--tokenizer` that are not files
TEXT_DEPENDENT = ("char", "byte", "bpe")
"""Those whose ids depend on the text: on its characters, words, or number of documents."""


def from_name(name: str, text: str) -> Tokenizer:
    """The tokenizer of `--tokenizer`; char takes its alphabet from `text`, bpe its merges.

    Raises:
        UserError: if `name` is neither in NAMES nor a file that `load` reads.
    """
    if name == "char":
        return CharTokenizer.from_text(text)
    if name == "bpe":
        from gptforge.estimate.formulas import default_vocab_size
        from gptforge.tokenizers.hf_bpe import train_bpe

        return train_bpe([text], default_vocab_size(len(text.encode("utf-8"))))
    if name in NAMES:
        return _from_record(name, {})
    if not Path(name).is_file():
        known = "gpt2, char, byte or bpe, nor the path of a tokenizer.json"
        raise UserError(f"--tokenizer {name}: neither {known}")
    return load(Path(name))


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a self-contained JSON file."""
    record = {"format": FORMAT, "version": VERSION, **tokenizer.to_json()}
    if tokenizer.eot_token is not None:
        record["marks_documents"] = tokenizer.prepends_eot
    atomic_write(path, json.dumps(record, ensure_ascii=True) + "\n")


def load(path: Path) -> Tokenizer:
    """Read a file that `save` or `gptforge tokenizer train` wrote; anything else is a UserError."""
    with parsing(path, "a tokenizer that can be used here"):
        record = json.loads(read_text(path))
        if isinstance(record, dict) and "model" in record:
            from gptforge.tokenizers.hf_bpe import parse_tokenizer_json

            return parse_tokenizer_json(record)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError("neither GPT-Forge's nor Hugging Face's format")
        if record.get("version") != VERSION:
            raise ValueError(f"version {short_repr(record.get('version'))}, not {VERSION}")
        tokenizer = _from_record(record["kind"], record)
        # Files of earlier versions lack it.
        if tokenizer.eot_token is not None and "marks_documents" in record:
            tokenizer.prepends_eot = record["marks_documents"] is True
        return tokenizer


def _from_record(kind: object, record: dict[str, Any]) -> Tokenizer:
    with_eot = record.get("marks") is True
    if kind == "char":
        return CharTokenizer(str(record["alphabet"]), with_eot=with_eot)
    if kind == "byte":
        return ByteTokenizer(with_eot=with_eot)
    if kind == "gpt2":
        # Imported late: it loads tiktoken, which other tokenizers do not need.
        from gptforge.tokenizers.gpt2 import GPT2Tokenizer

        return GPT2Tokenizer([str(merge) for merge in record["merges"]] if record else None)
    raise ValueError(f"unknown kind {short_repr(kind)}")
