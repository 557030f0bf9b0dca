"""Quick checks of a data set, from its index and both ends of its tokens.

They run before each training; `gptforge doctor` reads all of the data.
"""

import numpy as np

from gptforge.data.dataloader import count_sequences
from gptforge.data.dataset import Dataset, check_length
from gptforge.data.token_dataset import EDGE_TOKENS, edges
from gptforge.errors import UserError
from gptforge.findings import Finding, error, ok, warning
from gptforge.tokenizers.base import END_OF_TEXT, Tokens, byte_lengths

# A vocabulary of thousands that fits the text is in between; GPT-2's has 3.4 on plays.
MIN_BYTES_PER_TOKEN, MAX_BYTES_PER_TOKEN = 2.0, 12.0
LARGE_VOCAB = 1000  # ids from which on a vocabulary holds words and parts of words


def quick_check(dataset: Dataset, *, context_length: int, global_batch: int = 1) -> list[Finding]:
    """Check a data set's size, ids, end-of-text ids and bytes per token."""
    try:
        check_length(dataset, context_length)
        ends = edges(dataset.train)
        edges(dataset.val)
    except UserError as mistake:  # too short, or an id outside the vocabulary
        return [error(str(mistake))]
    return [
        *_check_size(dataset, context_length, global_batch),
        *_check_eot(dataset, ends),
        *_check_vocab(dataset, ends),
    ]


def _check_size(dataset: Dataset, context_length: int, global_batch: int) -> list[Finding]:
    num_train, num_val = len(dataset.train), len(dataset.val)
    sequences = count_sequences(num_train, context_length)
    size = f"{num_train:,} training tokens, {sequences:,} sequences of {context_length}"
    findings = [ok(size)]
    if sequences < global_batch:
        few = f"{size}, fewer than the {global_batch} of one step"
        hint = "use more text, a smaller --context_length or a smaller --batch_size"
        findings = [warning(few, f"each step sees some of the text twice; {hint}")]
    if 0 < num_val <= context_length:
        few = f"only {num_val:,} tokens are held out, less than one sequence"
        hint = f"the validation loss will be noisy; {dataset.more_val_hint}"
        findings.append(warning(few, hint))
    elif num_val:
        findings.append(ok(f"{num_val:,} tokens held out"))
    return findings


def _check_eot(dataset: Dataset, ends: list[Tokens]) -> list[Finding]:
    eot_token = dataset.tokenizer.eot_token
    # A data set that is known to hold documents may hold long ones.
    if eot_token is None or dataset.documents or len(dataset.train) < EDGE_TOKENS:
        return []
    if any((ids == eot_token).any() for ids in ends):
        return []
    problem = f"no {END_OF_TEXT} in the first and last {EDGE_TOKENS:,} tokens"
    return [warning(problem, "documents run into each other, unless it is one long text")]


def _check_vocab(dataset: Dataset, ends: list[Tokens]) -> list[Finding]:
    """Check that the vocabulary was made for such text, and the shards with it."""
    tokenizer = dataset.tokenizer
    if tokenizer.vocab_size < LARGE_VOCAB:
        return []
    if dataset.bytes:
        num_tokens = len(dataset.train) + len(dataset.val)
        return check_bytes_per_token(dataset.bytes / max(1, num_tokens), tokenizer.name)
    # Shards of other programs do not say how much text they hold.
    lengths = byte_lengths(tokenizer)
    sample = np.concatenate([lengths[ids] for ids in ends])
    return check_bytes_per_token(float(sample.mean()), tokenizer.name)


def check_bytes_per_token(ratio: float, name: str) -> list[Finding]:
    """Check the bytes per token of a vocabulary of thousands."""
    message = f"{ratio:.2f} bytes per token with the tokenizer {name}"
    if MIN_BYTES_PER_TOKEN <= ratio <= MAX_BYTES_PER_TOKEN:
        return [ok(message)]
    if ratio > MAX_BYTES_PER_TOKEN:
        return [warning(message, "too good for text: is it all the same, or not text at all?")]
    problem = "this vocabulary was made for other text, or the shards for another vocabulary"
    return [warning(message, f"{problem}: `gptforge tokenizer train` makes one for your text")]
