"""A byte-level BPE of the user's own, by Hugging Face's trainer (package `tokenizers`)."""

import json
from collections.abc import Iterable

from gptforge.errors import UserError, install_hint
from gptforge.tokenizers.gpt2 import GPT2Tokenizer
from gptforge.tokenizers.hf_loader import normalize_merges, unambiguous_merges

MIN_VOCAB_SIZE = 257
"""256 bytes and the mark between documents."""
MAX_VOCAB_SIZE = 2**20


def train_bpe(texts: Iterable[str], vocab_size: int) -> GPT2Tokenizer:
    """Learn merges from texts; the ids are in GPT-2's order: bytes, merges, the mark.

    Args:
        texts: read once; memory grows with how many different words they have.
        vocab_size: ids to make, all told; a small text may give fewer.

    Raises:
        UserError: for a size that is out of reach, or if the package is missing.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size must be from {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE:,}, not {vocab_size}"
        )
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            f"training a tokenizer needs the package tokenizers: {install_hint('bpe')}"
        ) from None
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return GPT2Tokenizer(unambiguous_merges(normalize_merges(merges)))
