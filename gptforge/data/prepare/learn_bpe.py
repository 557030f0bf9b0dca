"""`--tokenizer bpe`: a byte-level BPE learned from the training part of a text only."""

import logging
from collections.abc import Iterator, Sequence

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.job import last_safe_cut
from gptforge.data.prepare.readers import has_many_documents, read_documents
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.scan import scan_text
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule, text_digest
from gptforge.data.prepare.text_io import TextFormat, read_chunks
from gptforge.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

MAX_UNBROKEN_CHARS = 2**20
"""A longer run without whitespace is cut anywhere."""


def learn_bpe(request: PrepareRequest, sources: Sequence[Source], rule: SplitRule) -> Tokenizer:
    """Learn the tokenizer of a request; equal texts give equal tokenizers.

    The text is read twice, to count its bytes and to learn.

    Raises:
        UserError: for a `vocab_size` out of range, or if the package that learns is missing.
    """
    from gptforge.estimate.formulas import default_vocab_size
    from gptforge.tokenizers.train_bpe import train_bpe

    def training_text() -> Iterator[str]:
        bad_input = BadInputHandler(request.skip_bad)  # the jobs count it for the report
        return iter_training_text(sources, request.text_format, rule, bad_input)

    num_bytes = sum(len(text.encode("utf-8")) for text in training_text())
    vocab_size = request.vocab_size or default_vocab_size(num_bytes)
    tokenizer = train_bpe(training_text(), vocab_size)
    size = "the size of the text" if not request.vocab_size else "--vocab_size"
    logger.info(
        f"tokenizer: bpe, {tokenizer.vocab_size:,} ids by {size}, learned from the "
        f"{num_bytes / 1e6:.1f} MB to train on"
    )
    return tokenizer


def iter_training_text(
    sources: Sequence[Source], text_format: TextFormat, rule: SplitRule, bad_input: BadInputHandler
) -> Iterator[str]:
    """Yield the documents of the training split; a long text in parts that end between words."""
    needs_digest = rule.rule == "hash" or bool(rule.exceptions)
    cut = rule.cut if rule.rule == "character" else None
    for index, source in enumerate(sources):
        try:
            if has_many_documents(source, text_format):
                for document in read_documents(source, text_format, bad_input):
                    digest = text_digest(document.text) if needs_digest else 0
                    if rule.assign((index, document.index), digest) == "train":
                        yield document.text[:cut]
                continue
            digest = scan_text(source, text_format.encoding).digest if needs_digest else 0
            if rule.assign((index, 0), digest) == "train":
                yield from _iter_parts(source, text_format.encoding, cut)
        except BadInput as bad:
            bad_input.handle(bad)


def _iter_parts(source: Source, encoding: str, num_chars: int | None) -> Iterator[str]:
    """Yield the first `num_chars` characters of a text file, all if None, cut between words."""
    pending = ""
    for chunk in read_chunks(source, encoding=encoding):
        text = chunk.text[:num_chars]
        # A space at the old end may become a safe cut by the character after it.
        search_start = max(1, len(pending) - 1)
        pending += text
        if (position := last_safe_cut(pending, search_start)) is not None:
            yield pending[:position]
            pending = pending[position:]
        elif len(pending) > MAX_UNBROKEN_CHARS:
            yield pending
            pending = ""
        if num_chars is not None:
            num_chars -= len(text)
            if not num_chars:
                break
    if pending:
        yield pending
