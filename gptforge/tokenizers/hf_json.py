"""Reading Hugging Face's tokenizer.json, where it says what our own byte-level BPE says."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.gpt2 import GPT2Tokenizer, spelled_ids


class AddedTokensError(ValueError):
    """A tokenizer that is known here but for tokens added behind its own."""

    def __init__(self, tokens: Sequence[str], *, is_gpt2: bool) -> None:
        shown = ", ".join(repr(token[:40]) for token in tokens[:8])
        more = f" and {len(tokens) - 8:,} more" if len(tokens) > 8 else ""
        super().__init__(f"its tokenizer has added tokens, {shown}{more}")
        self.is_gpt2 = is_gpt2
        """Whether all its others are GPT-2's own."""


def read_hf_json(record: dict[str, Any]) -> GPT2Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        AddedTokensError: if there are tokens behind the end-of-text mark.
        ValueError: if it is of another kind; the message says in what.
    """
    model, before = record["model"], record.get("pre_tokenizer") or {}
    is_byte_level = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    if model.get("type") != "BPE" or not is_byte_level or before.get("add_prefix_space"):
        raise ValueError("only byte-level BPE with GPT-2's pattern is known here")
    if record.get("normalizer") or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError("it changes the text or skips merges, which is not known here")
    pairs = spelled_merges(model["merges"])
    wanted = {**spelled_ids(pairs), END_OF_TEXT: 256 + len(pairs)}
    vocab = {**model["vocab"], **{t["content"]: t["id"] for t in record.get("added_tokens") or ()}}
    behind = {token: i for token, i in vocab.items() if i >= len(wanted) and token not in wanted}
    if behind and vocab == wanted | behind:
        names = sorted(behind, key=lambda token: behind[token])
        raise AddedTokensError(names, is_gpt2=GPT2Tokenizer(pairs).name == "gpt2")
    if vocab != wanted:
        raise ValueError(f"its ids are not bytes, merges and {END_OF_TEXT}, in this order")
    made = GPT2Tokenizer(pairs)
    if made.name != "gpt2" and sound(pairs) != pairs:
        raise ValueError("some of its tokens come about in two ways")
    return made


def spelled_merges(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Each as 'left right', whether a file has it so or as a pair."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def sound(merges: Sequence[str]) -> list[str]:
    """The merges without those that would make programs disagree.

    Some look for the pair that was learned first, others for the token that was. Both find the
    same as long as every token comes about in one way, and comes about when it stands alone.
    """
    while True:
        ranks = {merge: rank for rank, merge in enumerate(merges)}
        made: set[str] = set()
        kept = []
        for merge in merges:
            token = merge.replace(" ", "", 1)
            if token not in made and _spell(token, ranks) == [token]:
                made.add(token)
                kept.append(merge)
        if len(kept) == len(merges):
            return kept
        # What was left out may have been a part of others.
        merges = kept


def _spell(text: str, ranks: dict[str, int]) -> list[str]:
    parts = list(text)
    while len(parts) > 1:
        pairs = [f"{left} {right}" for left, right in pairwise(parts)]
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
