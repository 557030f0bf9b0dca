"""The index of a prepared data set. It is written last, so the shards it lists are complete.

`.verified` beside it records which files were found intact, with their size, times and inode, so
that only files that changed since are hashed again.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptforge import files, tokenizers
from gptforge.data.token_dataset import ShardFile, read_raw_bin, read_shard_header
from gptforge.errors import UserError, error_reason, parsing
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
VERIFIED_FILE = ".verified"
FORMAT, VERSION = "gptforge-shards", 1
METADATA_FILES = (INDEX_FILE, TOKENIZER_FILE)  # their hashes are only in VERIFIED_FILE
SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")


@dataclass(frozen=True)
class Index:
    """A prepared data set: its folder, and the content of `index.json`."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def val_fraction(self) -> float:
        """The share that was to be held out."""
        return float(self.record["split"]["fraction"])

    def total(self, split: str, quantity: str) -> int:
        """Return the documents, characters, bytes or tokens of a split."""
        return int(self.record["splits"].get(split, {}).get(quantity, 0))

    def shards(self, split: str) -> list[ShardFile]:
        """The shards of a split; a UserError if one is missing or has another size."""
        read = read_raw_bin if self.record["layout"] == "headerless" else read_shard_header
        shards = []
        for record in (record for record in self.record["shards"] if record["split"] == split):
            shard = read(self.folder / record["file"])
            if shard.num_tokens != record["tokens"]:
                raise UserError(
                    f"{shard.path.as_posix()}: it holds {shard.num_tokens:,} tokens, and "
                    f"{INDEX_FILE} says {record['tokens']:,}: prepare the data again"
                )
            shards.append(shard)
        return shards

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the shards; it prepends the end-of-text id if they have it."""
        tokenizer = tokenizers.load(self.folder / TOKENIZER_FILE)
        if tokenizer.eot_token is not None:
            tokenizer.prepends_eot = self.record["split"].get("marks") is True
        return tokenizer


def write_index(folder: Path, record: Mapping[str, Any]) -> Index:
    """Write the index of a folder whose shards are complete."""
    record = {"format": FORMAT, "version": VERSION, **record}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    files.atomic_write(folder / INDEX_FILE, text)
    return Index(folder, record)


def read_index(folder: Path) -> Index | None:
    """Read the index of a folder; None if there is none, or only another program's."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    is_prepared = any(folder.glob("*.bin"))
    try:
        with parsing(path.as_posix(), "a readable index", "prepare the data again"):
            text = files.read_text(path)
            is_prepared |= FORMAT in text
            record = json.loads(text)
            _validate(record)
    except UserError:
        if not is_prepared:
            return None
        raise
    return Index(folder, record)


def _validate(record: Mapping[str, Any]) -> None:
    """Raise any exception unless all that is read of an index has the right type."""
    if (record["format"], record["version"]) != (FORMAT, VERSION):
        found = f"{short_repr(record['format'])}, version {short_repr(record['version'])}"
        raise ValueError(f"format {found}")
    fraction = record["split"]["fraction"]
    if not files.is_finite_number(fraction) or not 0 <= fraction < 1:
        raise ValueError(f"a fraction of {short_repr(fraction)}")
    tokenizer = record["tokenizer"]
    texts = (record["digest"], record["layout"], tokenizer["name"], tokenizer["sha256"])
    inputs = itertools.chain(*record.get("inputs", {}).values())
    if not all(isinstance(text, str) for text in (*texts, *record.get("notices", ()), *inputs)):
        raise TypeError("expected a string")
    for split in SPLITS:
        if not all(map(files.is_count, record["splits"].get(split, {}).values())):
            raise TypeError("expected counts")
    for shard in record["shards"]:
        name = shard["file"]
        # An index from elsewhere must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name or shard["split"] not in SPLITS:
            raise ValueError(f"shard {short_repr(name)}")
        if not isinstance(shard["sha256"], str) or not files.is_count(shard["tokens"]):
            raise ValueError(f"{short_repr(shard['tokens'])} tokens")


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def mark_verified(index: Index) -> None:
    """Record that the files of a preparation are intact: it has just written them."""
    hashes = {n: files.sha256(index.folder / n) for n in METADATA_FILES} | _shard_hashes(index)
    _write_verified(index.folder, {n: _entry(index.folder / n, hashes[n]) for n in hashes})


def find_corruption(index: Index, *, max_hash_bytes: int | None = None) -> str | None:
    """Describe what is wrong with the files of a prepared folder; None if nothing is.

    If more than `max_hash_bytes` would have to be hashed, only the shards' sizes are compared.
    """
    folder, verified = index.folder, _read_verified(index.folder)
    try:
        shard_hashes = _shard_hashes(index)
        expected = {n: verified.get(n, {}).get("sha256", "") for n in METADATA_FILES} | shard_hashes
        changed = [n for n in expected if verified.get(n) != _entry(folder / n, expected[n])]
        if not changed:
            return None
        num_bytes = sum((folder / name).stat().st_size for name in changed)
        if max_hash_bytes is not None and num_bytes > max_hash_bytes:
            changed = [name for name in changed if name not in shard_hashes]
        entries = {name: entry for name, entry in verified.items() if name not in changed}
        for name in changed:
            sha256 = files.sha256(folder / name)
            if expected[name] and sha256 != expected[name]:
                return f"{name} is not what {INDEX_FILE} says: it was changed or damaged"
            entries[name] = _entry(folder / name, sha256)
        # Early versions wrote no `.verified`: compare what the tokenizer contains.
        if TOKENIZER_FILE not in verified and not tokenizer_matches(index):
            return f"{TOKENIZER_FILE} is not the one that the shards were made with"
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        name = getattr(error, "filename", None) or INDEX_FILE
        return f"{Path(name).name}: {error_reason(error)}"
    # A read-only folder is hashed again the next time.
    with contextlib.suppress(OSError):
        _write_verified(folder, entries)
    return None


def tokenizer_matches(index: Index) -> bool:
    """Return whether the tokenizer beside the shards is the one that they were made with."""
    recorded = index.record["tokenizer"]["sha256"]
    return json_sha256(index.load_tokenizer().to_json()) == str(recorded)


def _shard_hashes(index: Index) -> dict[str, str]:
    return {shard["file"]: shard["sha256"] for shard in index.record["shards"]}


def _entry(path: Path, sha256: str) -> dict[str, Any]:
    facts = path.stat()
    stamp = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
    return {"sha256": sha256, "facts": stamp}


def _write_verified(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    files.atomic_write(folder / VERIFIED_FILE, json.dumps(entries, indent=1) + "\n")


def _read_verified(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(files.read_text(folder / VERIFIED_FILE))
        return {name: entry for name, entry in entries.items() if str(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
