"""What can be told about data at a glance, before a device is touched.

Training looks at this each time; `gptforge doctor` looks at all of the data.
"""

import numpy as np

from gptforge.data.corpus import Corpus
from gptforge.data.finding import Finding, error, good, warning
from gptforge.data.loader import count_windows, remedy_for_few
from gptforge.data.stream import TokenStream
from gptforge.errors import UserError
from gptforge.tokenizers.base import END_OF_TEXT, byte_lengths

GLANCE = 2**18
"""Tokens that are looked at, at either end of a stream."""
FEW_BYTES, MANY_BYTES = 2.0, 12.0
"""Bytes a token, between which a vocabulary of thousands fits a text; GPT-2's: 3.4 on plays."""
LARGE = 1000
"""Ids from which on a vocabulary is one of words and parts of words."""


def glance(corpus: Corpus, *, context_length: int, global_batch: int = 1) -> list[Finding]:
    """Findings about a corpus from its index, its headers and a look at both ends of it."""
    if bad := _ids(corpus):
        return bad
    return [*_size(corpus, context_length, global_batch), *_marks(corpus), *_fit(corpus)]


def _size(corpus: Corpus, context_length: int, global_batch: int) -> list[Finding]:
    train, held_out = len(corpus.train), len(corpus.held_out)
    windows = count_windows(train, context_length)
    what = f"{train:,} tokens to learn from, {windows:,} windows of {context_length}"
    if windows == 0:
        return [
            error(what, remedy_for_few(train)),
        ]
    found = [good(what)]
    if windows < global_batch:
        found = [
            warning(
                f"{what}, fewer than the {global_batch} of one update",
                "each update sees some of the text twice; use more text, a smaller "
                "--context_length or a smaller --batch_size",
            )
        ]
    if corpus.val_fraction and held_out < 2:
        found.append(error(f"{held_out} tokens held out", corpus.how_to_hold_out_more))
    elif 0 < held_out <= context_length:
        found.append(
            warning(
                f"only {held_out:,} tokens are held out, not one window",
                f"the judgement will be rough; {corpus.how_to_hold_out_more}",
            )
        )
    elif held_out:
        found.append(good(f"{held_out:,} tokens held out"))
    return found


def _ids(corpus: Corpus) -> list[Finding]:
    try:
        for stream in (corpus.train, corpus.held_out):
            _ends(stream)
    except UserError as mistake:
        return [error(str(mistake))]
    return []


def _marks(corpus: Corpus) -> list[Finding]:
    mark = corpus.tokenizer.end_of_text
    if mark is None or corpus.documents == 1 or len(corpus.train) < GLANCE:
        return []
    if any(bool(np.any(part == mark)) for part in _ends(corpus.train)):
        return []
    if corpus.documents:
        # It is known to hold documents, and they may be long ones.
        return []
    return [
        warning(
            f"no {END_OF_TEXT} in the first and last {GLANCE:,} tokens",
            "documents run into each other, unless it is one long text",
        )
    ]


def _fit(corpus: Corpus) -> list[Finding]:
    """Whether the vocabulary was made for such text, or the shards with this vocabulary."""
    known = corpus.tokenizer
    if known.size < LARGE:
        return []
    if corpus.bytes:
        tokens = len(corpus.train) + len(corpus.held_out)
        return bytes_a_token(corpus.bytes / max(1, tokens), known.name)
    # Shards of others do not say how much text they stand for.
    lengths = byte_lengths(known)
    seen = np.concatenate([lengths[part] for part in _ends(corpus.train)])
    return bytes_a_token(float(seen.mean()), known.name)


def bytes_a_token(ratio: float, name: str) -> list[Finding]:
    """What bytes a token say about a vocabulary of thousands."""
    what = f"{ratio:.2f} bytes a token with the tokenizer {name}"
    if FEW_BYTES <= ratio <= MANY_BYTES:
        return [good(what)]
    remedy = (
        "this vocabulary was made for other text, or shards for another vocabulary: "
        "`gptforge tokenizer train` makes one for yours"
    )
    if ratio > MANY_BYTES:
        remedy = "that is too good for text: is it all the same, or not text at all?"
    return [warning(what, remedy)]


def _ends(stream: TokenStream) -> list[np.ndarray]:
    length = len(stream)
    return [stream[:GLANCE], stream[max(0, length - GLANCE) : length]]
