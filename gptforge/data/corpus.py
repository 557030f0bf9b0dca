"""A text made ready: tokenizer, training tokens, held-out tokens, and the checks that need them."""

import hashlib
from dataclasses import dataclass

from gptforge.data.loader import count_windows
from gptforge.data.text import Text, split_text
from gptforge.errors import UserError
from gptforge.tokenizers import Tokenizer, Tokens, named


@dataclass(frozen=True)
class Corpus:
    """What a run learns from and is judged by."""

    text: Text
    sha256: str
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens
    """Empty where nothing is held out."""


def build_corpus(text: Text, *, tokenizer: str, val_fraction: float, context_length: int) -> Corpus:
    """Split and tokenize a text.

    Raises:
        UserError: if a part is too short, with its length.
    """
    known = named(tokenizer, text.content)
    train_text, held_out_text = split_text(text.content, val_fraction)
    train, held_out = known.encode(train_text), known.encode(held_out_text)
    if count_windows(len(train), context_length) == 0:
        raise UserError(
            f"--context_length {context_length} is longer than the training text, {len(train)} "
            f"tokens of {text.path}: use --context_length {max(1, len(train) - 1)} at most, or "
            "more text"
        )
    if held_out_text and len(held_out) < 2:
        raise UserError(
            f"--val_fraction {val_fraction} holds out {len(held_out)} token of {text.path}: "
            "2 are needed to judge anything; use a larger one, 0, or more text"
        )
    digest = hashlib.sha256(text.content.encode("utf-8")).hexdigest()
    return Corpus(text, digest, known, train, held_out)
