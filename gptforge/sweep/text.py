"""The text of a sweep: the training split as tokens, which trials split a second time."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptforge import tokenizers
from gptforge.data.dataset import Dataset
from gptforge.data.prepare.split import MIN_HASH_DOCUMENTS, DocumentStats, make_split_rule
from gptforge.data.shard_index import SPLITS, SplitName, json_sha256
from gptforge.data.token_dataset import ShardWriter, TokenDataset
from gptforge.sweep.space import INPUT_FIELDS, format_value
from gptforge.tokenizers.base import smallest_dtype

CHUNK_TOKENS = 2**24
"""Tokens read at a time."""
Spans = NDArray[np.int64]
"""(n, 2): the positions of the first token and after the last one."""


def prepare_text(folder: Path, dataset: Dataset) -> tuple[str, dict[str, str]]:
    """Write the training split of a text as tokens, with its tokenizer.

    The held-out split is the test split. Trials hold out a second one, by the same fraction: the
    end of the tokens, or, if there are copies of documents, full documents, so that all copies of
    one are on the same side. Earlier versions held out the end of any text, and so does a sweep
    that they began.

    Returns:
        A name of the text, and the flags with which trials read it; empty ones are left out.
    """
    text = [dataset.sha256, dataset.tokenizer.to_json(), dataset.val_fraction]
    text_id = json_sha256(text)[:8]
    undivided, tokenizer = folder / f"{text_id}.bin", folder / f"{text_id}.json"
    divided = {split: folder / text_id / f"{split}.bin" for split in SPLITS}
    if not undivided.exists() and not all(path.exists() for path in divided.values()):
        tokenizers.save(dataset.tokenizer, tokenizer)
        dtype: Any = np.dtype(smallest_dtype(dataset.tokenizer.vocab_size))
        spans = _split_documents(dataset)
        if not spans:
            _write(undivided, dataset.train, np.array([(0, len(dataset.train))]), dtype)
        for split in spans:
            divided[split].parent.mkdir(exist_ok=True)
            _write(divided[split], dataset.train, spans[split], dtype)
    path = undivided if undivided.exists() else folder / text_id
    return text_id, dict.fromkeys(INPUT_FIELDS, "") | {
        "input": path.as_posix(),
        "tokenizer": tokenizer.as_posix(),
        "raw_bin": "false",
        "val_fraction": format_value(dataset.val_fraction),
    }


def _split_documents(dataset: Dataset) -> dict[SplitName, Spans]:
    """The documents of each side of the second split, by the rule of the first one.

    Empty if no document is repeated, or the tokens do not say where documents begin.
    """
    tokens, eot = dataset.train, dataset.tokenizer.eot_token
    if eot is None or not dataset.tokenizer.prepends_eot:
        return {}
    spans = _find_documents(tokens, eot)
    digests = np.fromiter((_digest(tokens, start, stop, eot) for start, stop in spans), np.uint64)
    if len(np.unique(digests)) == len(digests):
        return {}
    first = zip(spans[:MIN_HASH_DOCUMENTS], digests[:MIN_HASH_DOCUMENTS], strict=True)
    stats = [
        DocumentStats((0, i), int(stop - start), int(digest))
        for i, ((start, stop), digest) in enumerate(first)
    ]
    rule = make_split_rule(stats, dataset.val_fraction)
    splits = (rule.assign((0, i), int(digest)) for i, digest in enumerate(digests))
    is_val = np.fromiter((split == "val" for split in splits), np.bool_)
    return {"train": spans[~is_val], "val": spans[is_val]}


def _find_documents(tokens: TokenDataset, eot: int) -> Spans:
    """The documents that are not empty; all but perhaps the first begin with `eot`."""
    starts: list[NDArray[np.int64]] = [
        start + np.flatnonzero(tokens[start : start + CHUNK_TOKENS] == eot)
        for start in range(0, len(tokens), CHUNK_TOKENS)
    ]
    bounds = np.unique(np.concatenate([[0], *starts, [len(tokens)]]))
    spans = np.stack([bounds[:-1], bounds[1:]], 1)
    return spans[np.diff(bounds) > 1]


def _digest(tokens: TokenDataset, start: int, stop: int, eot: int) -> int:
    """64 bits of a hash of a document, without the token before it."""
    sha256 = hashlib.sha256()
    if int(tokens[start : start + 1][0]) == eot:
        start += 1
    for begin in range(start, stop, CHUNK_TOKENS):
        chunk = tokens[begin : min(stop, begin + CHUNK_TOKENS)]
        sha256.update(chunk.astype("<u4").tobytes())
    return int.from_bytes(sha256.digest()[:8], "big")


def _write(path: Path, tokens: TokenDataset, spans: Spans, dtype: np.dtype[Any]) -> None:
    writer = ShardWriter(path, dtype)
    try:
        for start, stop in spans:
            for begin in range(start, stop, CHUNK_TOKENS):
                writer.write(tokens[begin : min(stop, begin + CHUNK_TOKENS)])
        writer.close()
    except BaseException:
        writer.abort()
        raise
