"""Our tokenizers as Hugging Face's tokenizer.json, and GPT-2's back from one.

Bytes are written as printable characters there, as GPT-2's own files do: space is "Ġ".
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
"""Our own form beside Hugging Face's, so that a model comes back exactly."""


def bytes_to_unicode() -> list[str]:
    """The character that stands for each byte, 256 of them."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer, eos_id: int | None = None) -> dict[str, Any]:
    """The content of tokenizer.json.

    Args:
        tokenizer: ours.
        end: the end-of-text id, for a tokenizer that has none of its own.

    Raises:
        UserError: for a kind that has no such form yet.
    """
    record = tokenizer.to_json()
    kind = record["kind"]
    eos_id = eos_id if tokenizer.eot_token is None else tokenizer.eot_token
    if kind == "char":
        return _marked(_char(str(record["alphabet"])), eos_id)
    if kind == "byte":
        vocab = {char: byte for byte, char in enumerate(bytes_to_unicode())}
        return _marked(_byte_level(vocab, []), eos_id)
    if kind == "gpt2":
        merges = record["merges"]
        assert isinstance(merges, list)
        return _gpt2([str(merge) for merge in merges])
    raise UserError(f"a tokenizer of kind '{kind}' cannot be exported yet")


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an exported or downloaded folder.

    Raises:
        UserError: if it is not one that this program knows.
    """
    if (folder / NATIVE_TOKENIZER).is_file():
        return load_tokenizer(folder / NATIVE_TOKENIZER)
    from gptforge.tokenizers.hf_loader import AddedTokensError, parse_tokenizer_json

    where = folder.as_posix()
    otherwise = f"gptforge import {shlex.quote(where)} OUT --tokenizer"
    hint = f"give another with --tokenizer: {otherwise} FILE"
    with parsing(where, "a tokenizer that can be used here", hint):
        try:
            if (folder / "tokenizer.json").is_file():
                return parse_tokenizer_json(json.loads(read_text(folder / "tokenizer.json")))
            if (folder / "merges.txt").is_file():
                return _of_older_files(folder)
        except AddedTokensError as error:
            remedy = f"gives the model without them: they are never written then: {otherwise} gpt2"
            if not error.is_gpt2:
                remedy = (
                    "reads it without them, with a copy of its tokenizer.json that they are taken "
                    f"out of: {otherwise} COPY.json"
                )
            raise UserError(f"{where}: {error}, which are unknown here; this {remedy}") from None
    raise UserError(
        f"{where}: neither {NATIVE_TOKENIZER}, tokenizer.json nor merges.txt is there: give --tokenizer: "
        f"{otherwise} gpt2, if it learned with GPT-2's, else FILE"
    )


def _of_older_files(folder: Path) -> Tokenizer:
    """The tokenizer of merges.txt, and of vocab.json and added_tokens.json where they are."""
    from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab
    from gptforge.tokenizers.hf_loader import parse_tokenizer_json

    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]

    def read(name: str) -> dict[str, int]:
        path = folder / name
        return dict(json.loads(read_text(path))) if path.is_file() else {}

    vocab, added = read("vocab.json"), read("added_tokens.json")
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


def _frame(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    blank = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **blank, "added_tokens": [], **parts, "model": model}


def _char(alphabet: str) -> dict[str, Any]:
    # A word-level model of one-character words: a stranger is an error, as it is here.
    return _frame(
        {
            "type": "WordLevel",
            "vocab": {char: i for i, char in enumerate(alphabet)},
            "unk_token": "[UNK]",
        },
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        },
        decoder={"type": "Fuse"},
    )


def _byte_level(
    vocab: dict[str, int], merges: list[str], *, splits: bool = False
) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _frame(
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
        pre_tokenizer={**level, "use_regex": splits},
        decoder={**level, "use_regex": splits},
    )


def _gpt2(merges: list[str]) -> dict[str, Any]:
    # GPT-2 counts the bytes that print first, then the others, then one token a merge.
    characters = bytes_to_unicode()
    first = [char for byte, char in enumerate(characters) if char == chr(byte)]
    rest = [char for byte, char in enumerate(characters) if char != chr(byte)]
    tokens = [*first, *rest, *(merge.replace(" ", "", 1) for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    end = len(tokens)
    return _marked(_byte_level(vocab, merges, splits=True), end)


def _marked(made: dict[str, Any], end: int | None) -> dict[str, Any]:
    """With an id for the mark between documents, where there is one."""
    if end is None:
        return made
    made["model"]["vocab"][END_OF_TEXT] = end
    made["added_tokens"] = [
        {
            "id": end,
            "content": END_OF_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ]
    return made
