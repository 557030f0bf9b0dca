"""The text of a sweep: the training split as tokens, which trials split a second time."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptforge import tokenizers
from gptforge.data.dataset import Dataset
from gptforge.data.prepare.split import MIN_HASH_DOCUMENTS, DocumentStats, make_split_rule
from gptforge.data.shard_index import SPLITS, SplitName, json_sha256
from gptforge.data.token_dataset import (
    BLOCK_TOKENS,
    ShardWriter,
    TokenDataset,
    find_documents,
)
from gptforge.sweep.space import INPUT_FIELDS, format_value
from gptforge.tokenizers.base import smallest_dtype

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
    # In arrays: a list of tuples would take ten times the memory.
    found = np.fromiter(find_documents(tokens, eot), np.dtype(("<u8", 3)))
    spans, digests = found[:, :2].astype(np.int64), found[:, 2]
    if len(np.unique(digests)) == len(digests):
        return {}
    stats = [
        DocumentStats((0, i), stop - start, digest)
        for i, (start, stop, digest) in enumerate(found[:MIN_HASH_DOCUMENTS].tolist())
    ]
    rule = make_split_rule(stats, dataset.val_fraction)
    splits = (rule.assign((0, i), int(digest)) for i, digest in enumerate(digests))
    is_val = np.fromiter((split == "val" for split in splits), np.bool_)
    return {"train": spans[~is_val], "val": spans[is_val]}


def _write(path: Path, tokens: TokenDataset, spans: Spans, dtype: np.dtype[Any]) -> None:
    writer = ShardWriter(path, dtype)
    try:
        for start, stop in spans:
            for begin in range(start, stop, BLOCK_TOKENS):
                writer.write(tokens[begin : min(stop, begin + BLOCK_TOKENS)])
        writer.close()
    except BaseException:
        writer.abort()
        raise
