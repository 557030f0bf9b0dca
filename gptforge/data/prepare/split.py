"""Select the documents that are held out for validation.

The rule depends on the text, not on paths. A single text is cut at a character. A hundred documents
or more are selected by hash, so that adding data never moves one to the other split. Fewer are cut
at the boundary nearest to the fraction. Files named validation are held out as they are.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from gptforge.data.shard_index import SplitName
from gptforge.errors import UserError
from gptforge.printable import join_first, pluralize

DocumentId = tuple[int, int]  # index of its source, and its index in it
MIN_HASH_DOCUMENTS = 100  # from this number on, documents are selected by hash

SplitWord = Literal["train", "val", "test"]
SPLIT_WORDS: dict[str, SplitWord] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class DocumentStats:
    """Properties of a document that the rule depends on."""

    id: DocumentId
    num_chars: int
    digest: int
    sha256: str = ""


@dataclass(frozen=True)
class SplitRule:
    """The rule that assigns documents to the training or the validation split."""

    rule: Literal["none", "character", "boundary", "hash", "files"]
    fraction: float
    cut: int = 0  # character where validation starts
    first_val: DocumentId = (0, 0)  # first document of validation, by the rule "boundary"
    exceptions: Mapping[str, SplitName] = field(default_factory=dict)  # digest in hex to split
    val_sources: tuple[int, ...] = ()
    prepend_eot: bool = True  # an end-of-text id before each document

    def assign(self, document_id: DocumentId, digest: int) -> SplitName:
        """Return the split of an undivided document."""
        if self.rule == "files":
            return "val" if document_id[0] in self.val_sources else "train"
        if self.rule == "boundary":
            split: SplitName = "val" if document_id >= self.first_val else "train"
        elif self.rule == "hash":
            split = "val" if digest < int(self.fraction * 2**64) else "train"
        else:
            return "train"
        return self.exceptions.get(f"{digest:016x}", split)

    def to_json(self) -> dict[str, Any]:
        """Return the record for the index."""
        return {
            "rule": self.rule,
            "fraction": self.fraction,
            "cut": self.cut,
            "first": self.first_val,
            "exceptions": dict(self.exceptions),
            "held_out": self.val_sources,
            "marks": self.prepend_eot,
        }


def text_digest(text: str) -> int:
    """The first 64 bits of the SHA-256 of a text in UTF-8."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def make_split_rule(
    documents: Sequence[DocumentStats], val_fraction: float, *, split_duplicates: bool = False
) -> SplitRule:
    """Build the rule for a data set from its first hundred documents, or all if there are fewer.

    A split that would be empty is a UserError. With `split_duplicates`, copies of a document may be
    in both splits if there are few documents.
    """
    assert documents, "the caller checks that there is a document"
    if val_fraction == 0:
        return SplitRule("none", val_fraction, prepend_eot=len(documents) > 1)
    if len(documents) == 1:
        num_chars = documents[0].num_chars
        cut = int(num_chars * (1 - val_fraction))
        if cut in (0, num_chars):
            size = pluralize(num_chars, "character")
            part = f"--val_fraction {val_fraction} of {size}"
            hint = "use --val_fraction 0 or more text"
            raise UserError(f"{part} leaves one split empty: {hint}")
        return SplitRule("character", val_fraction, cut=cut, prepend_eot=False)
    if len(documents) < MIN_HASH_DOCUMENTS:
        first_val = _nearest_boundary(documents, val_fraction)
        exceptions = {} if split_duplicates else _keep_copies_together(documents, first_val)
        return SplitRule("boundary", val_fraction, first_val=first_val, exceptions=exceptions)
    return SplitRule("hash", val_fraction, exceptions=_keep_from_empty(documents, val_fraction))


def _nearest_boundary(documents: Sequence[DocumentStats], val_fraction: float) -> DocumentId:
    ends = list(accumulate(document.num_chars for document in documents))
    target = ends.pop() * (1 - val_fraction)
    # The first of equally near ones.
    return documents[1 + min(range(len(ends)), key=lambda i: abs(ends[i] - target))].id


def _keep_copies_together(
    documents: Sequence[DocumentStats], first_val: DocumentId
) -> dict[str, SplitName]:
    """Move copies in both splits to training, or to validation if nothing else is held out.

    If all documents are equal they stay where they are.
    """
    train = {document.digest for document in documents if document.id < first_val}
    val = {document.digest for document in documents if document.id >= first_val}
    in_both = train & val
    # Of copies only, the last document is held out with its own.
    to_val = {documents[-1].digest} if train == val else in_both if in_both == val else set()
    if len(train | val) == 1:
        return {}
    return {f"{d:016x}": "val" if d in to_val else "train" for d in sorted(in_both)}


def _keep_from_empty(
    documents: Sequence[DocumentStats], val_fraction: float
) -> dict[str, SplitName]:
    """Hold out the lowest hash of the first hundred documents in any case, never the highest.

    So neither split is empty, and appending data changes nothing.
    """
    digests = sorted({document.digest for document in documents[:MIN_HASH_DOCUMENTS]})
    if len(digests) == 1:
        problem = f"the first {MIN_HASH_DOCUMENTS} documents are all the same"
        hint = "remove the copies, or use --val_fraction 0"
        raise UserError(f"{problem}, which would leave one split empty: {hint}")
    exceptions: dict[str, SplitName] = {}
    limit = int(val_fraction * 2**64)
    if digests[0] >= limit:
        exceptions[f"{digests[0]:016x}"] = "val"
    if digests[-1] < limit:
        exceptions[f"{digests[-1]:016x}"] = "train"
    return exceptions


def split_by_name(
    paths: Sequence[Path], *, require_train: bool = True
) -> Sequence[SplitWord | None]:
    """The split that the name of each file says, None for those that say none.

    A name is split into words at everything that is not a letter: `data-validation-0001.parquet` is
    for validation, `medieval_000.bin` is not. Without such a word in the file's name, the nearest
    folder with one decides, below the folder that all files have in common. With `require_train`,
    names decide only if one has the word train: otherwise `dev_notes.txt` is ordinary text.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 (keeps symlinks)
    try:
        depth = len(Path(os.path.commonpath([path.parent for path in absolute])).parts)
    except ValueError:
        depth = 1  # the paths are on different drives
    words = [_split_word(path.parts[depth:]) for path in absolute]
    names_count = len(paths) > 1 and ("train" in words or not require_train)
    return words if names_count else [None] * len(paths)


def split_shards(paths: Sequence[Path]) -> tuple[list[int], list[int]]:
    """Indices of the shards to train on, and of those to hold out, by their names.

    Shards whose name says test are left out. If none is left to train on, names are ignored.
    """
    words = split_by_name(paths, require_train=False)
    val = [i for i, word in enumerate(words) if word == "val"]
    train = [i for i, word in enumerate(words) if word not in ("val", "test")]
    return (train, val) if train else (val or list(range(len(paths))), [])


def describe_filename_splits(
    paths: Sequence[Path], words: Sequence[SplitWord | None], *, uses_val: bool
) -> str:
    """Describe in one line what happens to these files; empty if there are none."""
    reason = "held out as named" if uses_val else "left out, since nothing is held out"
    parts = []
    for split, what in (("val", reason), ("test", "left out as named")):
        names = [path.as_posix() for path, word in zip(paths, words, strict=True) if word == split]
        if names:
            parts.append(f"{what}: {join_first(names, 3)}")
    hint = " (--split_by_name false treats them like all others)" if parts else ""
    return "; ".join(parts) + hint


def _split_word(parts: Sequence[str]) -> SplitWord | None:
    for part in reversed(parts):
        found = {SPLIT_WORDS[word] for word in LETTERS.findall(part.lower()) if word in SPLIT_WORDS}
        # A name with two words, such as train_test.txt, is ambiguous.
        if len(found) == 1:
            return found.pop()
    return None
