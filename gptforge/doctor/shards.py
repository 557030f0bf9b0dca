"""Checks of token shards: reads all of them."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from gptforge import files
from gptforge.data.checks import quick_check
from gptforge.data.dataset import Dataset, DatasetOptions, open_dataset
from gptforge.data.shard_index import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Index,
    read_index,
    tokenizer_matches,
)
from gptforge.data.token_dataset import find_documents
from gptforge.doctor.duplicates import Duplicates
from gptforge.errors import UserError
from gptforge.findings import Finding, error, ok, warning
from gptforge.report.console import track
from gptforge.tokenizers.base import END_OF_TEXT


def check_shards(path: Path, options: DatasetOptions, *, context_length: int) -> list[Finding]:
    """Findings about a folder that `gptforge prepare` wrote, or about external shards."""
    found: list[Finding] = []
    try:
        # Without `verify`, which stops at the first corrupted file.
        dataset = open_dataset(path, replace(options, verify=False))
        index = read_index(path) if path.is_dir() else None
        found += map(warning, dataset.notices)
        found += _check_hashes(index) if index else []
        found += quick_check(dataset, context_length=context_length)
        if all(finding.level != "error" for finding in found):
            found += _check_documents(dataset)
    except UserError as problem:
        found.append(error(str(problem)))
    return found


def _check_hashes(index: Index) -> list[Finding]:
    found = []
    if not tokenizer_matches(index):
        hint = "put the right one back, or prepare the data again"
        found = [error(f"{TOKENIZER_FILE} is not the one that the shards were made with", hint)]
    shards = index.record["shards"]
    for shard in track(shards, "comparing hashes"):
        if files.sha256(index.folder / shard["file"]) != shard["sha256"]:
            problem = f"{shard['file']}: its content differs from its hash in {INDEX_FILE}"
            found.append(error(problem, "it is damaged: prepare the data again"))
    return found or [ok(f"{len(shards)} shards, with the hashes in {INDEX_FILE}")]


def _check_documents(dataset: Dataset) -> list[Finding]:
    eot = dataset.tokenizer.eot_token
    duplicates, num_documents = Duplicates(), 0
    for split, tokens in zip(SPLITS, (dataset.train, dataset.val), strict=True):
        if len(tokens) and tokens[:1][0] != eot:
            num_documents -= 1  # the split begins within a document, or there are no such ids
        documents = find_documents(tokens, eot, track=partial(track, description="reading tokens"))
        for number, (_, _, digest) in enumerate(documents, 1):
            num_documents += 1
            duplicates.add(digest, split, f"document {number:,} of {split}")
    num_tokens = len(dataset.train) + len(dataset.val)
    found = [ok(f"all {num_tokens:,} ids are in the vocabulary")]
    # Without end-of-text tokens, each split looks like one document.
    if num_documents > len(SPLITS):
        found.append(ok(f"{num_documents:,} documents, each after {END_OF_TEXT}"))
    elif eot is not None and dataset.documents > len(SPLITS):
        found.append(error(f"no {END_OF_TEXT} between {dataset.documents:,} documents"))
    return [*found, *duplicates.findings()]
