"""Training a byte-level BPE with Hugging Face's trainer (package `tokenizers`)."""

import json
import re
from collections.abc import Iterable, Iterator

from gptforge.errors import UserError
from gptforge.tokenizers.gpt2 import GPT2Tokenizer
from gptforge.tokenizers.hf_loader import normalize_merges, unambiguous_merges

MIN_VOCAB_SIZE = 257  # 256 bytes and the end-of-text token
MAX_VOCAB_SIZE = 2**20
LONG_WORD = re.compile(r"\S{1000}")
"""Cut after it: the time to learn from a word is quadratic in its length."""


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
