"""Tokenizers as Hugging Face's tokenizer.json, and GPT-2's read from it.

Bytes are written as printable characters, as in GPT-2's files: a space is "Ġ".
"""

import json
import shlex
from pathlib import Path
from typing import Any

from gptforge.errors import UserError, parsing
from gptforge.files import read_text
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import load as load_tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

NATIVE_TOKENIZER = "gptforge_tokenizer.json"
"""Our tokenizer file besides Hugging Face's, for an exact round trip."""


def bytes_to_unicode() -> list[str]:
    """The printable character for each of the 256 bytes (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer, eos_id: int | None = None) -> dict[str, Any]:
    """The content of tokenizer.json.

    Args:
        tokenizer: the tokenizer.
        eos_id: the end-of-text id, for a tokenizer without one.

    Raises:
        UserError: for a kind of tokenizer that is not supported.
    """
    record = tokenizer.to_json()
    kind = record["kind"]
    eos_id = eos_id if tokenizer.eot_token is None else tokenizer.eot_token
    byte_chars = bytes_to_unicode()
    if kind == "char":
        content = _word_level(str(record["alphabet"]))
    elif kind == "byte":
        content = _byte_level({char: byte for byte, char in enumerate(byte_chars)}, [])
    elif kind == "gpt2":
        assert isinstance(record["merges"], list)
        merges = [str(merge) for merge in record["merges"]]
        # Ids: printable bytes, the other bytes, one token per merge, end-of-text.
        first = [char for byte, char in enumerate(byte_chars) if char == chr(byte)]
        rest = [char for byte, char in enumerate(byte_chars) if char != chr(byte)]
        tokens = [*first, *rest, *(merge.replace(" ", "", 1) for merge in merges)]
        vocab = {token: i for i, token in enumerate(tokens)}
        content, eos_id = _byte_level(vocab, merges, use_regex=True), len(tokens)
    else:
        raise UserError(f"a tokenizer of kind '{kind}' cannot be exported yet")
    if eos_id is not None:
        content["model"]["vocab"][END_OF_TEXT] = eos_id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": eos_id, "content": END_OF_TEXT, **flags, "special": True}
        content["added_tokens"] = [token]
    return content


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an exported or downloaded folder.

    Raises:
        UserError: if it is not supported.
    """
    if (folder / NATIVE_TOKENIZER).is_file():
        return load_tokenizer(folder / NATIVE_TOKENIZER)
    from gptforge.tokenizers.hf_loader import AddedTokensError, parse_tokenizer_json

    source = folder.as_posix()
    command = f"gptforge import {shlex.quote(source)} OUT --tokenizer"
    with parsing(source, "a supported tokenizer", f"give another with --tokenizer: {command} FILE"):
        try:
            if (folder / "tokenizer.json").is_file():
                return parse_tokenizer_json(json.loads(read_text(folder / "tokenizer.json")))
            if (folder / "merges.txt").is_file():
                return _load_merges_txt(folder)
        except AddedTokensError as error:
            hint = f"gives the model without them: they are never generated then: {command} gpt2"
            if not error.is_gpt2:
                hint = (
                    "reads it without them, with a copy of its tokenizer.json from which they are "
                    f"removed: {command} COPY.json"
                )
            raise UserError(f"{source}: {error}, which are unknown here; this {hint}") from None
    raise UserError(
        f"{source}: neither {NATIVE_TOKENIZER}, tokenizer.json nor merges.txt is there: give "
        f"--tokenizer: {command} gpt2, if the model was trained with GPT-2's, else FILE"
    )


def _load_merges_txt(folder: Path) -> Tokenizer:
    """The tokenizer of merges.txt, with vocab.json and added_tokens.json if they are there."""
    from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab
    from gptforge.tokenizers.hf_loader import parse_tokenizer_json

    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]

    def read_vocab(name: str) -> dict[str, int]:
        path = folder / name
        return dict(json.loads(read_text(path))) if path.is_file() else {}

    vocab, added = read_vocab("vocab.json"), read_vocab("added_tokens.json")
    if not vocab and not added:
        return GPT2Tokenizer(merges)
    vocab = vocab or {**build_vocab(merges), END_OF_TEXT: 256 + len(merges)}
    return parse_tokenizer_json(
        {
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel"},
            "added_tokens": [{"content": token, "id": number} for token, number in added.items()],
        }
    )


def _content(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **unused, "added_tokens": [], **parts, "model": model}


def _word_level(alphabet: str) -> dict[str, Any]:
    """Words of one character; an unknown character is an error, as in our tokenizer."""
    vocab = {char: i for i, char in enumerate(alphabet)}
    return _content(
        {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        decoder={"type": "Fuse"},
    )


def _byte_level(
    vocab: dict[str, int], merges: list[str], *, use_regex: bool = False
) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
    return _content(
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in merges],
        },
        pre_tokenizer=byte_level,
        decoder=dict(byte_level),
    )
