"""Finish a preparation: report what was skipped and write the index."""

import contextlib
import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.input_errors import MAX_EXAMPLES
from gptforge.data.prepare.job import JobResult
from gptforge.data.prepare.request import fingerprint
from gptforge.data.prepare.scan import ScanResult
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule
from gptforge.data.shard_index import SPLITS, Index, SplitName, json_sha256, write_index
from gptforge.data.token_dataset import HEADER_BYTES
from gptforge.errors import UserError
from gptforge.printable import pluralize
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT, smallest_dtype

logger = logging.getLogger(__name__)

MAX_SOURCES = 1000  # files that the index lists
MAX_FINGERPRINTS = 20_000  # every checkpoint keeps 20 bytes for each
MAX_NOTICES = 20
VAL_FRACTION_TOLERANCE = 2  # report a held-out fraction that is off by this factor


def finalize(
    out_dir: Path,
    sources: Sequence[Source],
    scan: ScanResult,
    tokenizer: Tokenizer,
    results: Sequence[JobResult],
    *,
    raw_bin: bool,
) -> Index:
    """Log a summary and write the index; with `raw_bin`, join the shards of each split first.

    `results` are in the order of the data.
    """
    shards = [shard for result in results for shard in result.shards]
    totals = {split: _totals(shards, split) for split in SPLITS}
    notices = _notices(sources, scan, results)
    skipped = sum((Counter(result.skipped) for result in results), Counter[str]())
    examples = [example for result in results for example in result.examples]
    notes = [*_describe_share(scan.split_rule, totals), *notices[:MAX_EXAMPLES]]
    if (more := len(notices) - MAX_EXAMPLES) > 0:
        notes.append(f"and {more} more like these")
    if skipped:
        counts = (f"{count} x {kind}" for kind, count in sorted(skipped.items()))
        notes.append(f"skipped: {', '.join(counts)}")
        notes += [f"skipped {example}" for example in examples[:MAX_EXAMPLES]]
    for note in notes:
        logger.info(f"note: {note}")
    if not totals["train"]["tokens"]:
        raise UserError("no text is left to train on")
    tokenizer_sha256 = json_sha256(tokenizer.to_json())
    shard_hashes = [shard["sha256"] for shard in shards]
    record = {
        "tokenizer": {
            "name": tokenizer.name,
            "size": tokenizer.vocab_size,
            "end_of_text": tokenizer.eot_token,
            "sha256": tokenizer_sha256,
        },
        "dtype": np.dtype(smallest_dtype(tokenizer.vocab_size)).name,
        "layout": "headerless" if raw_bin else "llm.c",
        "split": scan.split_rule.to_json(),
        "digest": scan.sha256 or json_sha256([tokenizer_sha256, shard_hashes]),
        "splits": totals,
        "shards": _join_shards(out_dir, shards) if raw_bin else shards,
        "sources": [{"path": s.name, "bytes": s.size} for s in sources[:MAX_SOURCES]],
        "files": len(sources),
        "inputs": _input_splits(sources, results),
        "skipped": dict(sorted(skipped.items())),
        "notices": notices[:MAX_NOTICES],
    }
    index = write_index(out_dir, record)
    if raw_bin:
        for shard in shards:
            (out_dir / shard["file"]).unlink(missing_ok=True)
    return index


def _notices(
    sources: Sequence[Source], scan: ScanResult, results: Sequence[JobResult]
) -> list[str]:
    """Notes for the user about the split and the text."""
    notices = list(scan.notices)
    if literals := sum(result.num_eot_literals for result in results):
        times = pluralize(literals, "time")
        notice = f"{END_OF_TEXT} stands in the text {times}, as plain characters"
        if any(source.kind == "text" for source in sources):
            notice += (
                f": `gptforge prepare` with --split_on '{END_OF_TEXT}' makes documents of the text "
                "in between"
            )
        notices.append(notice)
    return notices + sorted({notice for result in results for notice in result.notices})


def _input_splits(
    sources: Sequence[Source], results: Sequence[JobResult]
) -> dict[str, list[SplitName]]:
    """The splits of each file's text, by the file's fingerprint."""
    by_source: dict[int, set[SplitName]] = {}
    for result in results:
        for index, splits in result.splits.items():
            by_source.setdefault(index, set()).update(splits)
    by_fingerprint: dict[str, set[SplitName]] = {}
    for index, names in sorted(by_source.items())[:MAX_FINGERPRINTS]:
        # A pipe cannot be read again, nor a damaged file to its end.
        with contextlib.suppress(OSError):
            if (path := sources[index].path).is_file():
                by_fingerprint.setdefault(fingerprint(path), set()).update(names)
    return {name: sorted(splits) for name, splits in by_fingerprint.items()}


def _describe_share(rule: SplitRule, totals: Mapping[SplitName, Mapping[str, int]]) -> list[str]:
    """A note if the share that is held out is far from the fraction."""
    num_bytes = {split: total["bytes"] for split, total in totals.items()}
    share = num_bytes["val"] / max(1, sum(num_bytes.values()))
    low, high = rule.fraction / VAL_FRACTION_TOLERANCE, rule.fraction * VAL_FRACTION_TOLERANCE
    if rule.rule == "files" or not rule.fraction or low <= share <= high:
        return []
    return [
        f"{100 * share:.3g}% of the text is held out, not {100 * rule.fraction:.3g}%: "
        "documents and files are not divided, and there are few of them or some are large"
    ]


def _totals(shards: Sequence[dict[str, Any]], split: str) -> dict[str, int]:
    names = ("documents", "characters", "bytes", "tokens")
    return {n: sum(shard[n] for shard in shards if shard["split"] == split) for n in names}


def _join_shards(out_dir: Path, shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write train.bin and val.bin, without headers."""
    joined = []
    for split in SPLITS:
        names = [shard["file"] for shard in shards if shard["split"] == split]
        if not names:
            continue
        path = out_dir / f"{split}.bin"
        with files.atomic_replace(path) as partial, partial.open("wb") as target:
            for name in names:
                with (out_dir / name).open("rb") as shard:
                    shard.seek(HEADER_BYTES)
                    shutil.copyfileobj(shard, target, 2**20)
        record = {"file": path.name, "split": split, "sha256": files.sha256(path)}
        joined.append(record | _totals(shards, split))
    return joined
