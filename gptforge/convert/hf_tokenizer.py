"""Tokenizers as Hugging Face's tokenizer.json, and GPT-2's read from it.

Bytes are written as printable characters, as in GPT-2's files: a space is "Ġ".
"""

import json
from pathlib import Path
from typing import Any

from gptforge.errors import UserError, parsing
from gptforge.files import read_text
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import load as load_tokenizer
from gptforge.tokenizers.base import END_OF_TEXT, bytes_to_unicode

NATIVE_TOKENIZER = "gptforge_tokenizer.json"
"""Our tokenizer file besides Hugging Face's, for an exact round trip."""


def tokenizer_json(tokenizer: Tokenizer, eos_id: int | None = None) -> dict[str, Any]:
    """The content of tokenizer.json; `eos_id` is for a tokenizer without an end-of-text id."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as HFTokenizer

    from gptforge.tokenizers.gpt2 import build_vocab

    record: dict[str, Any] = tokenizer.to_json()
    eos_id = eos_id if tokenizer.eot_token is None else tokenizer.eot_token
    special = {} if eos_id is None else {END_OF_TEXT: eos_id}
    if record["kind"] == "char":
        # Words of one character; an unknown character is an error, as in our tokenizer.
        vocab = {char: i for i, char in enumerate(record["alphabet"])}
        result = HFTokenizer(models.WordLevel(vocab | special, unk_token="[UNK]"))
        result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        result.decoder = decoders.Fuse()
    else:
        is_byte = record["kind"] == "byte"
        merges = [] if is_byte else record["merges"]
        vocab = build_vocab(merges)
        if is_byte:
            chars = bytes_to_unicode()
            vocab = {chars[byte]: byte for byte in range(256)}
        affixes = dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), "")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        result = HFTokenizer(models.BPE(vocab | special, pairs, **affixes))
        result.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=not is_byte
        )
        result.decoder = decoders.ByteLevel()
    if special:
        result.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    content: dict[str, Any] = json.loads(result.to_str())
    return content


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of an exported or downloaded folder; a UserError if it is not supported."""
    if (folder / NATIVE_TOKENIZER).is_file():
        return load_tokenizer(folder / NATIVE_TOKENIZER)
    from gptforge.tokenizers.hf_bpe import AddedTokensError, parse_tokenizer_json

    source = folder.as_posix()
    command = f"gptforge import {quote(source)} OUT --tokenizer"
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
    problem = f"neither {NATIVE_TOKENIZER}, tokenizer.json nor merges.txt is there"
    hint = f"give --tokenizer: {command} gpt2, if the model was trained with GPT-2's, else FILE"
    raise UserError(f"{source}: {problem}: {hint}")


def _load_merges_txt(folder: Path) -> Tokenizer:
    """The tokenizer of merges.txt, with vocab.json and added_tokens.json if they are there."""
    from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab
    from gptforge.tokenizers.hf_bpe import parse_tokenizer_json

    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    paths = (folder / "vocab.json", folder / "added_tokens.json")
    vocab, added = (json.loads(read_text(path)) if path.is_file() else {} for path in paths)
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
