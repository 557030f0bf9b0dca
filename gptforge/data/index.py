"""The index of a prepared data set: written last, it says that all the rest is there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptforge import tokenizers
from gptforge.data.shards import read_header, read_headerless
from gptforge.data.stream import ShardFile
from gptforge.errors import UserError
from gptforge.files import read_small, write_atomic
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
        text = read_small(path)
        is_ours |= FORMAT in text
        record = json.loads(text)
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {record['format']}, version {record['version']}")
        float(record["split"]["fraction"])
        _check_shards(record["shards"])
        if not isinstance(record["digest"], str) or not isinstance(record["layout"], str):
            raise TypeError("digest and layout are strings")
        for side in record["splits"].values():
            if not all(isinstance(number, int) for number in side.values()):
                raise TypeError("counts are whole numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if not is_ours:
            return None
        raise UserError(
            f"{path.as_posix()}: not a readable index ({error!r}): prepare the data again"
        ) from None
    return Index(folder, record)


def _check_shards(shards: Sequence[Mapping[str, Any]]) -> None:
    for shard in shards:
        name, tokens = shard["file"], shard["tokens"]
        # A stranger's index must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name or shard["split"] not in SIDES:
            raise ValueError(f"shard {name!r}")
        if not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"{tokens!r} tokens")


def hash_of(value: object) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
