"""Reading Hugging Face's tokenizer.json, where it says what our own byte-level BPE says."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.gpt2 import GPT2Tokenizer, build_vocab


class AddedTokensError(ValueError):
    """A tokenizer that is known here but for tokens added behind its own."""

    def __init__(self, tokens: Sequence[str], *, is_gpt2: bool) -> None:
        shown = ", ".join(repr(token[:40]) for token in tokens[:8])
        more = f" and {len(tokens) - 8:,} more" if len(tokens) > 8 else ""
        super().__init__(f"its tokenizer has added tokens, {shown}{more}")
        self.is_gpt2 = is_gpt2
        """Whether all its others are GPT-2's own."""


def load_hf_tokenizer(record: dict[str, Any]) -> GPT2Tokenizer:
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
    pairs = normalize_merges(model["merges"])
    wanted = {**build_vocab(pairs), END_OF_TEXT: 256 + len(pairs)}
    vocab = {**model["vocab"], **{t["content"]: t["id"] for t in record.get("added_tokens") or ()}}
    behind = {token: i for token, i in vocab.items() if i >= len(wanted) and token not in wanted}
    if behind and vocab == wanted | behind:
        names = sorted(behind, key=lambda token: behind[token])
        raise AddedTokensError(names, is_gpt2=GPT2Tokenizer(pairs).name == "gpt2")
    if vocab != wanted:
        raise ValueError(f"its ids are not bytes, merges and {END_OF_TEXT}, in this order")
    made = GPT2Tokenizer(pairs)
    if made.name != "gpt2" and not are_unambiguous(pairs):
        raise ValueError("some of its tokens come about in two ways")
    return made


def normalize_merges(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """Each as 'left right', whether a file has it so or as a pair."""
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def unambiguous_merges(merges: Sequence[str]) -> list[str]:
    """The merges without those that would make programs disagree.

    Some look for the pair that was learned first, others for the token that was. Both find the
    same as long as every token comes about in one way, and comes about when it stands alone.
    """
    while True:
        kept = list(_unambiguous(merges))
        if len(kept) == len(merges):
            return kept
        # What was left out may have been a part of others.
        merges = kept


def are_unambiguous(merges: Sequence[str]) -> bool:
    """Whether `sound` would keep all of them: found in one pass, and up to the first it drops."""
    return all(kept == merge for kept, merge in zip_longest(_unambiguous(merges), merges))


def _unambiguous(merges: Sequence[str]) -> Iterator[str]:
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    made: set[str] = set()
    for merge in merges:
        token = merge.replace(" ", "", 1)
        if token not in made and bpe(token, ranks) == [token]:
            made.add(token)
            yield merge


def bpe(text: str, ranks: Mapping[str, int]) -> list[str]:
    """The tokens of a text: the pair of least rank is merged first, of equal ones the leftmost.

    O(n log n) merges, with the pairs in a heap: a token may be as long as a file.
    """
    parts: list[str] = list(text)
    after = [*range(1, len(parts)), -1]
    before = list(range(-1, len(parts) - 1))
    heap: list[tuple[int, int, str]] = []

    def push(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            pair = f"{parts[left]} {parts[right]}"
            if (rank := ranks.get(pair)) is not None:
                heapq.heappush(heap, (rank, left, pair))

    for place in range(len(parts) - 1):
        push(place, place + 1)
    while heap:
        _, left, pair = heapq.heappop(heap)
        right = after[left]
        if not parts[left] or right < 0 or pair != f"{parts[left]} {parts[right]}":
            # One of the two was merged with another in the meantime.
            continue
        parts[left], parts[right] = parts[left] + parts[right], ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        push(before[left], left)
        push(left, after[left])
    return [part for part in parts if part]
