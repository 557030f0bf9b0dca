"""`--tokenizer bpe`: a byte-level BPE learned from the training part of a text only."""

import logging
from collections.abc import Iterator, Sequence

from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule
from gptforge.data.prepare.split_reader import FileSpan, read_split
from gptforge.tokenizers import Tokenizer

logger = logging.getLogger(__name__)


def learn_bpe(request: PrepareRequest, sources: Sequence[Source], rule: SplitRule) -> Tokenizer:
    """Learn the tokenizer of a request; equal texts give equal tokenizers.

    The text is read twice, to count its bytes and to learn.
    """
    from gptforge.tokenizers.train_bpe import default_vocab_size, train_bpe

    def training_text() -> Iterator[str]:
        bad_input = BadInputHandler(request.skip_bad)  # the jobs count it for the report
        for index, source in enumerate(sources):
            for part in read_split(FileSpan(index, source), rule, request.text_format, bad_input):
                if part.split == "train":
                    yield part.text

    num_bytes = sum(len(text.encode("utf-8")) for text in training_text())
    vocab_size = request.vocab_size or default_vocab_size(num_bytes)
    tokenizer = train_bpe(training_text(), vocab_size)
    size = "the size of the text" if not request.vocab_size else "--vocab_size"
    logger.info(
        f"tokenizer: bpe, {tokenizer.vocab_size:,} ids by {size}, learned from the "
        f"{num_bytes / 1e6:.1f} MB to train on"
    )
    return tokenizer
