"""GPT-2's byte-level BPE with merges of any text: from a tokenizer.json, or by training."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gptforge.errors import UserError
from gptforge.printable import join_first
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab

MIN_VOCAB_SIZE = 257  # 256 bytes and the end-of-text token
MAX_VOCAB_SIZE = 2**20
LONG_WORD = re.compile(r"\S{1000}")
"""Cut after it: the time to learn from a word is quadratic in its length."""


class AddedTokensError(ValueError):
    """A supported tokenizer, except for added tokens.

    Attributes:
        is_gpt2: whether all other tokens are GPT-2's.
    """

    def __init__(self, tokens: Sequence[str], *, is_gpt2: bool) -> None:
        shown = join_first([repr(token[:40]) for token in tokens], 8)
        super().__init__(f"the tokenizer has added tokens, {shown}")
        self.is_gpt2 = is_gpt2


def parse_tokenizer_json(record: dict[str, Any]) -> GPT2Tokenizer:
    """Convert a parsed tokenizer.json.

    Raises:
        AddedTokensError: if there are tokens after the end-of-text token.
        ValueError: if it differs from GPT-2's algorithm in another way.
    """
    model, splitter = record["model"], record.get("pre_tokenizer") or {}
    is_byte_level = splitter.get("type") == "ByteLevel" and splitter.get("use_regex", True)
    if model.get("type") != "BPE" or not is_byte_level or splitter.get("add_prefix_space"):
        raise ValueError("only byte-level BPE with GPT-2's pattern is supported")
    if record.get("normalizer") or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError("changing the text or skipping merges is not supported")
    merges = normalize_merges(model["merges"])
    expected = {**build_vocab(merges), END_OF_TEXT: 256 + len(merges)}
    added = {token["content"]: token["id"] for token in record.get("added_tokens") or ()}
    vocab = {**model["vocab"], **added}
    extra = {t: i for t, i in vocab.items() if i >= len(expected) and t not in expected}
    if extra and vocab == expected | extra:
        tokens = sorted(extra, key=lambda token: extra[token])
        raise AddedTokensError(tokens, is_gpt2=GPT2Tokenizer(merges).name == "gpt2")
    if vocab != expected:
        raise ValueError(f"the ids are not bytes, merges and {END_OF_TEXT}, in this order")
    tokenizer = GPT2Tokenizer(merges)
    if tokenizer.name != "gpt2" and unambiguous_merges(merges) != merges:
        raise ValueError("some tokens result from more than one sequence of merges")
    return tokenizer


def normalize_merges(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Merges as "left right", which some files store as pairs."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def unambiguous_merges(merges: Sequence[str]) -> list[str]:
    """Drop the merges for which implementations of BPE disagree.

    Some rank the pairs, others the tokens that these make. Both agree if every token results from
    one sequence of merges only, and from encoding its own text.
    """
    from tokenizers import Tokenizer, models

    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = dict.fromkeys([*build_vocab(merges), *(part for pair in pairs for part in pair)], 0)
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(vocab)}, merges=pairs))
    kept: dict[str, str] = {}
    for merge in merges:
        token = merge.replace(" ", "", 1)
        if token not in kept and bpe.encode(token).tokens == [token]:
            kept[token] = merge
    # Others may have been built on a merge that was dropped.
    all_kept = len(kept) == len(merges)
    return list(merges) if all_kept else unambiguous_merges(list(kept.values()))


def train_bpe(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Learn merges from texts; ids are ordered as GPT-2's: bytes, merges, end-of-text token.

    Args:
        texts: read once; memory grows with the number of distinct words.
        vocab_size: total number of ids; a small text may give fewer.

    Raises:
        UserError: for a size out of range.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        limits = f"from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE:,}"
        raise UserError(f"--vocab_size must be {limits}, not {vocab_size}")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_cut_long_words(texts), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return GPT2Tokenizer(unambiguous_merges(normalize_merges(merges)))


def _cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        ends = [match.end() for match in LONG_WORD.finditer(text)]
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
            yield text[start:end]
