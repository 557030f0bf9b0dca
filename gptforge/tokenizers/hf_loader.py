"""Loading a Hugging Face tokenizer.json that is GPT-2's byte-level BPE with any merges."""

from collections.abc import Sequence
from typing import Any

from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab


class AddedTokensError(ValueError):
    """A supported tokenizer, except for added tokens.

    Attributes:
        is_gpt2: whether all other tokens are GPT-2's.
    """

    def __init__(self, tokens: Sequence[str], *, is_gpt2: bool) -> None:
        shown = ", ".join(repr(token[:40]) for token in tokens[:8])
        more = f" and {len(tokens) - 8:,} more" if len(tokens) > 8 else ""
        super().__init__(f"the tokenizer has added tokens, {shown}{more}")
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
