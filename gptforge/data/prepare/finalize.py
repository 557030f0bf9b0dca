"""The end of a preparation: what was left out is said, and the index is put in its place."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.index import (
    SPLITS,
    Index,
    json_sha256,
    write_index,
)
from gptforge.data.input_errors import MAX_EXAMPLES, BadInputHandler
from gptforge.data.prepare.job import JobResult
from gptforge.data.prepare.request import fingerprint
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitName, SplitRule
from gptforge.data.token_dataset import HEADER_BYTES
from gptforge.errors import UserError
from gptforge.printable import pluralize
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT, smallest_dtype

MAX_SOURCES = 1000
"""Files that the index names."""
MAX_FINGERPRINTS = 20_000
"""Files whose fingerprints are kept: 20 bytes of each stand in every checkpoint."""
MAX_NOTICES = 20
VAL_SHARE_TOLERANCE = 2
"""Times what was asked for that is held out, or part of it, from which on it is said."""


@dataclass(frozen=True)
class PreparedData:
    """All that was made, before it has an index."""

    sources: Sequence[Source]
    split_rule: SplitRule
    tokenizer: Tokenizer
    job_results: Sequence[JobResult]
    skipped: BadInputHandler
    """What was left out before the jobs began."""
    sha256: str
    """Of the text, where there is only one."""
    split_notices: tuple[str, ...] = ()
    """What should be known about the split."""

    @property
    def shards(self) -> list[dict[str, Any]]:
        """In the order of the data."""
        return [shard for result in self.job_results for shard in result.shards]

    @property
    def skip_counts(self) -> Counter[str]:
        """How much, by what was wrong with it."""
        counts: Counter[str] = Counter(self.skipped.counts)
        for result in self.job_results:
            counts.update(result.skipped)
        return counts

    @property
    def notices(self) -> list[str]:
        """What was mended, and what stands in the text."""
        found = sorted({notice for result in self.job_results for notice in result.notices})
        if marks := sum(result.num_eot_literals for result in self.job_results):
            of = pluralize(marks, "time", "times")
            is_text = any(source.kind == "text" for source in self.sources)
            way = (
                f": `gptforge prepare` with --split_on '{END_OF_TEXT}' makes documents of what "
                "lies between"
            )
            what = f"{END_OF_TEXT} stands in the text {of}, as plain characters"
            found.insert(0, what + (way if is_text else ""))
        return [*self.split_notices, *found]

    @property
    def inputs(self) -> dict[str, list[SplitName]]:
        """Which sides the text of each file went to, by the file's fingerprint."""
        sides_of: dict[int, set[SplitName]] = {}
        for result in self.job_results:
            for name, went_to in result.splits.items():
                sides_of.setdefault(int(name), set()).update(went_to)
        found: dict[str, set[SplitName]] = {}
        for number, sides in sorted(sides_of.items())[:MAX_FINGERPRINTS]:
            # A pipe cannot be read again.
            if (path := self.sources[number].path).is_file():
                found.setdefault(fingerprint(path), set()).update(sides)
        return {known_by: sorted(sides) for known_by, sides in found.items()}


def finalize(out: Path, prepared: PreparedData, *, raw_bin: bool) -> Index:
    """Write the index; with `headerless`, join the shards first.

    Raises:
        UserError: if nothing was left to learn.
    """
    shards, tokenizer = prepared.shards, prepared.tokenizer
    splits = {side: _sums(shards, side) for side in SPLITS}
    if not splits["train"]["tokens"]:
        raise UserError("no text was left to learn")
    identity = json_sha256(tokenizer.to_json())
    record = {
        "tokenizer": {
            "name": tokenizer.name,
            "size": tokenizer.vocab_size,
            "end_of_text": tokenizer.eot_token,
            "sha256": identity,
        },
        "dtype": np.dtype(smallest_dtype(tokenizer.vocab_size)).name,
        "layout": "headerless" if raw_bin else "llm.c",
        "split": prepared.split_rule.to_json(),
        "digest": prepared.sha256 or json_sha256([identity, [shard["sha256"] for shard in shards]]),
        "splits": splits,
        "shards": _joined(out, shards) if raw_bin else shards,
        "sources": [{"path": s.name, "bytes": s.size} for s in prepared.sources[:MAX_SOURCES]],
        "files": len(prepared.sources),
        "inputs": prepared.inputs,
        "skipped": dict(sorted(prepared.skip_counts.items())),
        "notices": prepared.notices[:MAX_NOTICES],
    }
    index = write_index(out, record)
    if raw_bin:
        for shard in shards:
            (out / shard["file"]).unlink(missing_ok=True)
    return index


def log_summary(prepared: PreparedData, log: Callable[[str], None]) -> None:
    """Say what was mended, what was left out, and if another share than asked is held out."""
    counts_of = {side: _sums(prepared.shards, side)["bytes"] for side in SPLITS}
    asked, share = prepared.split_rule.fraction, counts_of["val"] / max(1, sum(counts_of.values()))
    is_chosen = prepared.split_rule.rule != "files"
    if (
        is_chosen
        and asked
        and not asked / VAL_SHARE_TOLERANCE <= share <= asked * VAL_SHARE_TOLERANCE
    ):
        log(
            f"note: {100 * share:.3g}% of the text are held out, not {100 * asked:.3g}%: documents "
            "and files go to one side as a whole, and there are few of them"
        )
    for notice in prepared.notices[:MAX_EXAMPLES]:
        log(f"note: {notice}")
    if (more := len(prepared.notices) - MAX_EXAMPLES) > 0:
        log(f"note: and so in {more} more cases")
    if counts := prepared.skip_counts:
        listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        log(f"note: left out: {listed}")
        examples = [
            *prepared.skipped.examples,
            *(e for r in prepared.job_results for e in r.examples),
        ]
        for example in examples[:MAX_EXAMPLES]:
            log(f"note: left out {example}")


def _sums(shards: Sequence[dict[str, Any]], side: str) -> dict[str, int]:
    mine = [shard for shard in shards if shard["split"] == side]
    names = ("documents", "characters", "bytes", "tokens")
    return {name: sum(shard[name] for shard in mine) for name in names}


def _joined(out: Path, shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All shards of a side as one file without a header: train.bin and val.bin."""
    made = []
    for side in SPLITS:
        mine = [shard for shard in shards if shard["split"] == side]
        if not mine:
            continue
        path = out / f"{side}.bin"
        with files.atomic_replace(path) as partial, partial.open("wb") as whole:
            for shard in mine:
                with (out / shard["file"]).open("rb") as part:
                    part.seek(HEADER_BYTES)
                    while block := part.read(2**20):
                        whole.write(block)
        facts = {"file": path.name, "split": side, "sha256": files.sha256(path)}
        made.append({**facts, **_sums(mine, side)})
    return made
