"""What can be told about data at a glance, before a device is touched.

Training looks at this each time; `gptforge doctor` looks at all of the data.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.dataset import Dataset
from gptforge.data.token_dataset import TokenDataset
from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, byte_lengths


@dataclass(frozen=True)
class Finding:
    """One thing, and what to do about it."""

    level: Literal["good", "warning", "error"]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.message}: {self.fix}" if self.fix else self.message


def ok(message: str) -> Finding:
    """As it should be."""
    return Finding("good", message)


def warning(message: str, fix: str = "") -> Finding:
    """Worth a look; work goes on."""
    return Finding("warning", message, fix)


def error(message: str, fix: str = "") -> Finding:
    """Nothing good would come of it."""
    return Finding("error", message, fix)


SAMPLE_TOKENS = 2**18
"""Tokens that are looked at, at either end of a stream."""
MIN_BYTES_PER_TOKEN, MAX_BYTES_PER_TOKEN = 2.0, 12.0
"""Bytes a token, between which a vocabulary of thousands fits a text; GPT-2's: 3.4 on plays."""
LARGE_VOCAB = 1000
"""Ids from which on a vocabulary is one of words and parts of words."""


def quick_check(corpus: Dataset, *, context_length: int, global_batch: int = 1) -> list[Finding]:
    """Findings about a corpus from its index, its headers and a look at both ends of it."""
    if bad := _ids(corpus):
        return bad
    return [*_size(corpus, context_length, global_batch), *_marks(corpus), *_fit(corpus)]


def _size(corpus: Dataset, context_length: int, global_batch: int) -> list[Finding]:
    train, held_out = len(corpus.train), len(corpus.val)
    windows = count_sequences(train, context_length)
    what = f"{train:,} tokens to learn from, {windows:,} windows of {context_length}"
    if windows == 0:
        return [
            error(what, too_short_hint(train)),
        ]
    found = [ok(what)]
    if windows < global_batch:
        found = [
            warning(
                f"{what}, fewer than the {global_batch} of one update",
                "each update sees some of the text twice; use more text, a smaller "
                "--context_length or a smaller --batch_size",
            )
        ]
    if corpus.val_fraction and held_out < 2:
        found.append(error(f"{held_out} tokens held out", corpus.more_val_hint))
    elif 0 < held_out <= context_length:
        found.append(
            warning(
                f"only {held_out:,} tokens are held out, not one window",
                f"the judgement will be rough; {corpus.more_val_hint}",
            )
        )
    elif held_out:
        found.append(ok(f"{held_out:,} tokens held out"))
    return found


def _ids(corpus: Dataset) -> list[Finding]:
    try:
        for stream in (corpus.train, corpus.val):
            _ends(stream)
    except UserError as mistake:
        return [error(str(mistake))]
    return []


def _marks(corpus: Dataset) -> list[Finding]:
    mark = corpus.tokenizer.eot_token
    if mark is None or corpus.documents == 1 or len(corpus.train) < SAMPLE_TOKENS:
        return []
    if any(bool(np.any(part == mark)) for part in _ends(corpus.train)):
        return []
    if corpus.documents:
        # It is known to hold documents, and they may be long ones.
        return []
    return [
        warning(
            f"no {END_OF_TEXT} in the first and last {SAMPLE_TOKENS:,} tokens",
            "documents run into each other, unless it is one long text",
        )
    ]


def _fit(corpus: Dataset) -> list[Finding]:
    """Whether the vocabulary was made for such text, or the shards with this vocabulary."""
    known = corpus.tokenizer
    if known.vocab_size < LARGE_VOCAB:
        return []
    if corpus.bytes:
        tokens = len(corpus.train) + len(corpus.val)
        return check_bytes_per_token(corpus.bytes / max(1, tokens), known.name)
    # Shards of others do not say how much text they stand for.
    lengths = byte_lengths(known)
    seen = np.concatenate([lengths[part] for part in _ends(corpus.train)])
    return check_bytes_per_token(float(seen.mean()), known.name)


def check_bytes_per_token(ratio: float, name: str) -> list[Finding]:
    """What bytes a token say about a vocabulary of thousands."""
    what = f"{ratio:.2f} bytes a token with the tokenizer {name}"
    if MIN_BYTES_PER_TOKEN <= ratio <= MAX_BYTES_PER_TOKEN:
        return [ok(what)]
    remedy = (
        "this vocabulary was made for other text, or shards for another vocabulary: "
        "`gptforge tokenizer train` makes one for yours"
    )
    if ratio > MAX_BYTES_PER_TOKEN:
        remedy = "that is too good for text: is it all the same, or not text at all?"
    return [warning(what, remedy)]


def _ends(stream: TokenDataset) -> list[np.ndarray]:
    length = len(stream)
    return [stream[:SAMPLE_TOKENS], stream[max(0, length - SAMPLE_TOKENS) : length]]
