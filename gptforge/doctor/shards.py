"""What is wrong with token shards: every one is read to its end."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gptforge import files
from gptforge.data.checks import (
    Finding,
    error,
    ok,
    quick_check,
    warning,
)
from gptforge.data.dataset import Dataset, DatasetOptions, open_dataset
from gptforge.data.index import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Index,
    read_index,
    tokenizer_matches,
)
from gptforge.data.token_dataset import ShardDataset, TokenDataset
from gptforge.doctor.duplicates import Duplicates
from gptforge.errors import UserError
from gptforge.printable import pluralize
from gptforge.tokenizers.base import END_OF_TEXT

BLOCK_TOKENS = 2**20
"""Tokens that are read at a time."""


def check_shards(path: Path, options: DatasetOptions, *, context_length: int) -> list[Finding]:
    """Findings about a folder that `prepare` made, or shards of others."""
    try:
        # All findings are wanted, not the first one.
        corpus = open_dataset(path, replace(options, verify=False), log=lambda _: None)
        index = read_index(path) if path.is_dir() else None
    except UserError as mistake:
        return [error(str(mistake))]
    found = [warning(notice) for notice in corpus.notices if index is None]
    found += _checksums(index) if index else []
    found += quick_check(corpus, context_length=context_length)
    if any(finding.level == "error" for finding in found):
        return found
    try:
        found += _documents(corpus)
    except UserError as mistake:
        found.append(error(str(mistake)))
    return found


def _checksums(index: Index) -> list[Finding]:
    found = []
    if not tokenizer_matches(index):
        found.append(
            error(
                f"{TOKENIZER_FILE} is not the one that the shards were made with",
                "put the right one back, or prepare the data again",
            )
        )
    for shard in index.record["shards"]:
        if files.sha256(index.folder / shard["file"]) != shard["sha256"]:
            what = f"{shard['file']}: its content is not what {INDEX_FILE} says"
            found.append(error(what, "it was damaged: prepare the data again"))
    if not found:
        found.append(ok(f"{len(index.record['shards'])} shards, all as {INDEX_FILE} has them"))
    return found


def _documents(corpus: Dataset) -> list[Finding]:
    mark = corpus.tokenizer.eot_token
    doubles, counts = Duplicates(), dict.fromkeys(SPLITS, 0)
    for side, stream in zip(SPLITS, (corpus.train, corpus.val), strict=True):
        assert isinstance(stream, ShardDataset)
        for number, digest in enumerate(_digests(stream, mark)):
            counts[side] += 1
            doubles.add(digest, side, f"document {number + 1:,} of {side}")
    total = sum(counts.values())
    found = [ok(f"all {len(corpus.train) + len(corpus.val):,} ids are in the vocabulary")]
    if mark is not None and total <= len(SPLITS) and corpus.documents > len(SPLITS):
        found.append(error(f"no {END_OF_TEXT} between {corpus.documents:,} documents"))
    elif total > len(SPLITS):
        found.append(ok(f"{total:,} documents, each behind {END_OF_TEXT}"))
    if doubles.in_both_splits:
        what = pluralize(doubles.in_both_splits, "document stands", "documents stand")
        found.append(
            warning(
                f"{what} on both sides, first {doubles.first_in_both}",
                "the held-out loss will look better than it is; leave the doubles out",
            )
        )
    if doubles.repeated > doubles.in_both_splits:
        alike = doubles.repeated - doubles.in_both_splits
        what = pluralize(alike, "document stands", "documents stand")
        found.append(
            warning(
                f"{what} there a second time", "the model will learn them by heart; leave them out"
            )
        )
    if doubles.is_full:
        found.append(warning("not all documents could be remembered to look for doubles"))
    return found


def _digests(stream: TokenDataset, mark: int | None) -> Iterator[int]:
    """64 bits for each document, however long."""
    running, length = hashlib.sha256(), 0
    for start in range(0, len(stream), BLOCK_TOKENS):
        block = stream[start : start + BLOCK_TOKENS].astype(np.uint32)
        borders = np.flatnonzero(block == mark).tolist() if mark is not None else []
        begin = 0
        for border in [*borders, len(block)]:
            running.update(block[begin:border].tobytes())
            length += border - begin
            if border < len(block):
                if length:
                    yield int.from_bytes(running.digest()[:8], "big")
                running, length = hashlib.sha256(), 0
            begin = border + 1
    if length:
        yield int.from_bytes(running.digest()[:8], "big")
