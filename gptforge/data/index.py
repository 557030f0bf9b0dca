"""The index of a prepared data set: written last, it says that all the rest is there."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptforge import tokenizers
from gptforge.data.shards import read_header, read_headerless
from gptforge.data.stream import ShardFile
from gptforge.errors import UserError, parsing
from gptforge.files import is_number, read_small, write_atomic
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
FORMAT, VERSION = "gptforge-shards", 1
SIDES = ("train", "val")


@dataclass(frozen=True)
class Index:
    """A prepared data set."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """What stands for the whole: of one text its SHA-256, of more that of all shards'."""
        return str(self.record["digest"])

    @property
    def val_fraction(self) -> float:
        """Share that was held out."""
        return float(self.record["split"]["fraction"])

    @property
    def inputs(self) -> dict[str, list[str]]:
        """The files that it was made of, by fingerprint, and the sides that their text went to."""
        found = self.record.get("inputs")
        known = found.items() if isinstance(found, dict) else ()
        return {name: list(map(str, sides)) for name, sides in known if isinstance(sides, list)}

    def total(self, side: str, what: str) -> int:
        """Documents, characters, bytes or tokens of train or val."""
        return int(self.record["splits"].get(side, {}).get(what, 0))

    def shards(self, side: str) -> list[ShardFile]:
        """The shards of train or val, checked to be there and whole, by size.

        Raises:
            UserError: for one that is not.
        """
        read = read_headerless if self.record["layout"] == "headerless" else read_header
        found = []
        for shard in self.record["shards"]:
            if shard["split"] != side:
                continue
            file = read(self.folder / shard["file"])
            if file.tokens != shard["tokens"]:
                raise UserError(
                    f"{file.path.as_posix()}: it holds {file.tokens:,} tokens, and {INDEX} says "
                    f"{shard['tokens']:,}: prepare the data again"
                )
            found.append(file)
        return found

    def tokenizer(self) -> Tokenizer:
        """The one that the shards were made with; it knows whether documents are marked in them."""
        tokenizer = tokenizers.load(self.folder / TOKENIZER)
        if tokenizer.end_of_text is not None:
            tokenizer.marks_documents = self.record["split"].get("marks") is True
        return tokenizer


def write_index(folder: Path, record: Mapping[str, Any]) -> Index:
    """Put the last piece in its place."""
    whole = {"format": FORMAT, "version": VERSION, **record}
    write_atomic(folder / INDEX, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return Index(folder, whole)


def read_index(folder: Path) -> Index | None:
    """The index of a folder; None where there is none, or another program's beside no shards.

    Raises:
        UserError: for one that is damaged, or from a version to come.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    is_ours = any(folder.glob("*.bin"))
    try:
        with parsing(path.as_posix(), "a readable index", "prepare the data again"):
            text = read_small(path)
            is_ours |= FORMAT in text
            record = json.loads(text)
            _check(record)
    except UserError:
        if not is_ours:
            return None
        raise
    return Index(folder, record)


def _check(record: Mapping[str, Any]) -> None:
    """Raise whatever comes first, unless all that is read of an index has the right type."""
    if (record["format"], record["version"]) != (FORMAT, VERSION):
        found = f"{short_repr(record['format'])}, version {short_repr(record['version'])}"
        raise ValueError(f"format {found}")
    if not is_number(record["split"]["fraction"]) or not 0 <= record["split"]["fraction"] < 1:
        raise ValueError(f"a fraction of {short_repr(record['split']['fraction'])}")
    known = record["tokenizer"]
    texts = (record["digest"], record["layout"], known["name"], known["sha256"])
    if not all(isinstance(text, str) for text in (*texts, *record.get("notices", ()))):
        raise TypeError("a text was expected")
    for side in SIDES:
        if not all(map(_is_count, record["splits"].get(side, {}).values())):
            raise TypeError("counts are whole numbers")
    for shard in record["shards"]:
        name = shard["file"]
        # A stranger's index must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name or shard["split"] not in SIDES:
            raise ValueError(f"shard {short_repr(name)}")
        if not isinstance(shard["sha256"], str) or not _is_count(shard["tokens"]):
            raise ValueError(f"{short_repr(shard['tokens'])} tokens")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def hash_of(value: object) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
