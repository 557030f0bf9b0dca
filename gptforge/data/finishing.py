"""The end of a preparation: what was left out is said, and the index is put in its place."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.bad import EXAMPLES, Skipped
from gptforge.data.chosen import fingerprint
from gptforge.data.finding import counted
from gptforge.data.index import SIDES, Index, hash_of, write_index
from gptforge.data.job import Done
from gptforge.data.shards import HEADER_BYTES
from gptforge.data.sources import Source
from gptforge.data.split import Side, Split
from gptforge.errors import UserError
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT, smallest_dtype

MOST_SOURCES = 1000
"""Files that the index names."""
MAX_INPUTS = 20_000
"""Files whose fingerprints are kept: 20 bytes of each stand in every checkpoint."""
MOST_NOTICES = 20
FAR = 2
"""Times what was asked for that is held out, or part of it, from which on it is said."""


@dataclass(frozen=True)
class Made:
    """All that was made, before it has an index."""

    sources: Sequence[Source]
    split: Split
    tokenizer: Tokenizer
    results: Sequence[Done]
    skipped: Skipped
    """What was left out before the jobs began."""
    sha256: str
    """Of the text, where there is only one."""
    on_split: tuple[str, ...] = ()
    """What should be known about the split."""

    @property
    def shards(self) -> list[dict[str, Any]]:
        """In the order of the data."""
        return [shard for result in self.results for shard in result.shards]

    @property
    def left_out(self) -> Counter[str]:
        """How much, by what was wrong with it."""
        counts: Counter[str] = Counter(self.skipped.counts)
        for result in self.results:
            counts.update(result.skipped)
        return counts

    @property
    def notices(self) -> list[str]:
        """What was mended, and what stands in the text."""
        found = sorted({notice for result in self.results for notice in result.notices})
        if marks := sum(result.marks for result in self.results):
            of = counted(marks, "time", "times")
            is_text = any(source.kind == "text" for source in self.sources)
            way = (
                f": `gptforge prepare` with --split_on '{END_OF_TEXT}' makes documents of what "
                "lies between"
            )
            what = f"{END_OF_TEXT} stands in the text {of}, as plain characters"
            found.insert(0, what + (way if is_text else ""))
        return [*self.on_split, *found]

    @property
    def inputs(self) -> dict[str, list[Side]]:
        """Which sides the text of each file went to, by the file's fingerprint."""
        sides_of: dict[int, set[Side]] = {}
        for result in self.results:
            for name, went_to in result.sides.items():
                sides_of.setdefault(int(name), set()).update(went_to)
        found: dict[str, set[Side]] = {}
        for number, sides in sorted(sides_of.items())[:MAX_INPUTS]:
            # A pipe cannot be read again.
            if (path := self.sources[number].path).is_file():
                found.setdefault(fingerprint(path), set()).update(sides)
        return {known_by: sorted(sides) for known_by, sides in found.items()}


def finish(out: Path, made: Made, *, headerless: bool) -> Index:
    """Write the index; with `headerless`, join the shards first.

    Raises:
        UserError: if nothing was left to learn.
    """
    shards, tokenizer = made.shards, made.tokenizer
    splits = {side: _sums(shards, side) for side in SIDES}
    if not splits["train"]["tokens"]:
        raise UserError("no text was left to learn")
    identity = hash_of(tokenizer.to_json())
    record = {
        "tokenizer": {
            "name": tokenizer.name,
            "size": tokenizer.size,
            "end_of_text": tokenizer.end_of_text,
            "sha256": identity,
        },
        "dtype": np.dtype(smallest_dtype(tokenizer.size)).name,
        "layout": "headerless" if headerless else "llm.c",
        "split": made.split.to_json(),
        "digest": made.sha256 or hash_of([identity, [shard["sha256"] for shard in shards]]),
        "splits": splits,
        "shards": _joined(out, shards) if headerless else shards,
        "sources": [{"path": s.name, "bytes": s.size} for s in made.sources[:MOST_SOURCES]],
        "files": len(made.sources),
        "inputs": made.inputs,
        "skipped": dict(sorted(made.left_out.items())),
        "notices": made.notices[:MOST_NOTICES],
    }
    index = write_index(out, record)
    if headerless:
        for shard in shards:
            (out / shard["file"]).unlink(missing_ok=True)
    return index


def tell(made: Made, say: Callable[[str], None]) -> None:
    """Say what was mended, what was left out, and if another share than asked is held out."""
    counts_of = {side: _sums(made.shards, side)["bytes"] for side in SIDES}
    asked, share = made.split.fraction, counts_of["val"] / max(1, sum(counts_of.values()))
    is_chosen = made.split.rule != "files"
    if is_chosen and asked and not asked / FAR <= share <= asked * FAR:
        say(
            f"note: {100 * share:.3g}% of the text are held out, not {100 * asked:.3g}%: documents "
            "and files go to one side as a whole, and there are few of them"
        )
    for notice in made.notices[:EXAMPLES]:
        say(f"note: {notice}")
    if (more := len(made.notices) - EXAMPLES) > 0:
        say(f"note: and so in {more} more cases")
    if counts := made.left_out:
        listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
        say(f"note: left out: {listed}")
        examples = [*made.skipped.examples, *(e for r in made.results for e in r.examples)]
        for example in examples[:EXAMPLES]:
            say(f"note: left out {example}")


def _sums(shards: Sequence[dict[str, Any]], side: str) -> dict[str, int]:
    mine = [shard for shard in shards if shard["split"] == side]
    names = ("documents", "characters", "bytes", "tokens")
    return {name: sum(shard[name] for shard in mine) for name in names}


def _joined(out: Path, shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All shards of a side as one file without a header: train.bin and val.bin."""
    made = []
    for side in SIDES:
        mine = [shard for shard in shards if shard["split"] == side]
        if not mine:
            continue
        path = out / f"{side}.bin"
        with files.replacing(path) as partial, partial.open("wb") as whole:
            for shard in mine:
                with (out / shard["file"]).open("rb") as part:
                    part.seek(HEADER_BYTES)
                    while block := part.read(2**20):
                        whole.write(block)
        facts = {"file": path.name, "split": side, "sha256": files.sha256(path)}
        made.append({**facts, **_sums(mine, side)})
    return made
