"""Whether prepared data still is what was written, without reading it all at every start.

A stamp in the folder says which files were found intact, and by what (size, times, inode) to see
that nobody wrote to them since. Only files that changed are hashed again.
"""

import contextlib
import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptforge import files, tokenizers
from gptforge.data.token_dataset import ShardFile, read_raw_bin, read_shard_header
from gptforge.errors import UserError, error_reason, parsing
from gptforge.files import atomic_write, is_finite_number, read_text
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer

INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
FORMAT, VERSION = "gptforge-shards", 1
SPLITS = ("train", "val")


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

    def total(self, split: str, quantity: str) -> int:
        """Documents, characters, bytes or tokens of train or val."""
        return int(self.record["splits"].get(split, {}).get(quantity, 0))

    def shards(self, split: str) -> list[ShardFile]:
        """The shards of train or val, checked to be there and whole, by size.

        Raises:
            UserError: for one that is not.
        """
        read = read_raw_bin if self.record["layout"] == "headerless" else read_shard_header
        found = []
        for shard in self.record["shards"]:
            if shard["split"] != split:
                continue
            file = read(self.folder / shard["file"])
            if file.num_tokens != shard["tokens"]:
                raise UserError(
                    f"{file.path.as_posix()}: it holds {file.num_tokens:,} tokens, and {INDEX_FILE} says "
                    f"{shard['tokens']:,}: prepare the data again"
                )
            found.append(file)
        return found

    def load_tokenizer(self) -> Tokenizer:
        """The one that the shards were made with; it knows whether documents are marked in them."""
        tokenizer = tokenizers.load(self.folder / TOKENIZER_FILE)
        if tokenizer.eot_token is not None:
            tokenizer.prepends_eot = self.record["split"].get("marks") is True
        return tokenizer


def write_index(folder: Path, record: Mapping[str, Any]) -> Index:
    """Put the last piece in its place."""
    whole = {"format": FORMAT, "version": VERSION, **record}
    atomic_write(folder / INDEX_FILE, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return Index(folder, whole)


def read_index(folder: Path) -> Index | None:
    """The index of a folder; None where there is none, or another program's beside no shards.

    Raises:
        UserError: for one that is damaged, or from a version to come.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    is_ours = any(folder.glob("*.bin"))
    try:
        with parsing(path.as_posix(), "a readable index", "prepare the data again"):
            text = read_text(path)
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
    if (
        not is_finite_number(record["split"]["fraction"])
        or not 0 <= record["split"]["fraction"] < 1
    ):
        raise ValueError(f"a fraction of {short_repr(record['split']['fraction'])}")
    known = record["tokenizer"]
    texts = (record["digest"], record["layout"], known["name"], known["sha256"])
    if not all(isinstance(text, str) for text in (*texts, *record.get("notices", ()))):
        raise TypeError("a text was expected")
    for side in SPLITS:
        if not all(map(_is_count, record["splits"].get(side, {}).values())):
            raise TypeError("counts are whole numbers")
    for shard in record["shards"]:
        name = shard["file"]
        # A stranger's index must not lead out of its folder.
        if not isinstance(name, str) or Path(name).name != name or shard["split"] not in SPLITS:
            raise ValueError(f"shard {short_repr(name)}")
        if not isinstance(shard["sha256"], str) or not _is_count(shard["tokens"]):
            raise ValueError(f"{short_repr(shard['tokens'])} tokens")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def json_sha256(value: object) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


VERIFIED_FILE = ".verified"
Stamp = dict[str, dict[str, Any]]


def mark_verified(index: Index) -> None:
    """Note the files of a preparation that was just finished as intact."""
    folder = index.folder
    hashes = {name: files.sha256(folder / name) for name in (INDEX_FILE, TOKENIZER_FILE)}
    hashes |= _shard_hashes(index)
    _save(folder, {name: _entry(folder / name, digest) for name, digest in hashes.items()})


def find_corruption(index: Index, *, max_hash_bytes: int | None = None) -> str | None:
    """What is wrong with the files of a prepared folder; None if nothing is.

    Args:
        index: of the folder.
        max_bytes: if more than this would have to be hashed, only the sizes of the shards are
            compared.
    """
    folder, stamp = index.folder, _load(index.folder)
    try:
        changed = [
            name
            for name in (INDEX_FILE, TOKENIZER_FILE, *_shard_hashes(index))
            if not _is_unchanged(folder / name, stamp.get(name), index)
        ]
        if not changed:
            return None
        sizes = sum((folder / name).stat().st_size for name in changed)
        if max_hash_bytes is not None and sizes > max_hash_bytes:
            changed = [name for name in changed if name in (INDEX_FILE, TOKENIZER_FILE)]
        found: Stamp = {name: entry for name, entry in stamp.items() if name not in changed}
        for name in changed:
            digest = files.sha256(folder / name)
            if (wanted := _expected(name, stamp, index)) and digest != wanted:
                return f"{name} is not what {INDEX_FILE} says: it was changed or damaged"
            found[name] = _entry(folder / name, digest)
        # One that was made before there were stamps is compared as what it says.
        if TOKENIZER_FILE not in stamp and not tokenizer_matches(index):
            return f"{TOKENIZER_FILE} is not the one that the shards were made with"
    except UserError as error:
        return str(error)
    except OSError as error:
        where = Path(str(error.filename or folder)).name
        return f"{where}: {error.strerror or error}"
    except Exception as error:
        # An index from elsewhere may hold anything.
        return f"{INDEX_FILE}: {error_reason(error)}"
    # A folder that is not ours to write to is hashed again the next time.
    with contextlib.suppress(OSError):
        _save(folder, found)
    return None


def tokenizer_matches(index: Index) -> bool:
    """Whether the tokenizer beside the shards is the one that they were made with."""
    recorded = index.record.get("tokenizer")
    if not isinstance(recorded, Mapping) or "sha256" not in recorded:
        return True
    return json_sha256(index.load_tokenizer().to_json()) == str(recorded["sha256"])


def _shard_hashes(index: Index) -> dict[str, str]:
    return {shard["file"]: str(shard.get("sha256", "")) for shard in index.record["shards"]}


def _expected(name: str, stamp: Stamp, index: Index) -> str:
    if name in (INDEX_FILE, TOKENIZER_FILE):
        return str(stamp.get(name, {}).get("sha256", ""))
    return _shard_hashes(index)[name]


def _is_unchanged(path: Path, entry: Mapping[str, Any] | None, index: Index) -> bool:
    if entry is None or entry.get("facts") != _facts(path):
        return False
    return (
        path.name in (INDEX_FILE, TOKENIZER_FILE)
        or entry["sha256"] == _shard_hashes(index)[path.name]
    )


def _entry(path: Path, digest: str) -> dict[str, Any]:
    return {"sha256": digest, "facts": _facts(path)}


def _facts(path: Path) -> list[int]:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(None, "not a regular file", path.as_posix())
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _save(folder: Path, stamp: Stamp) -> None:
    files.atomic_write(folder / VERIFIED_FILE, json.dumps(stamp, indent=1) + "\n")


def _load(folder: Path) -> Stamp:
    """The stamp of a folder; empty where there is none that can be read."""
    try:
        stamp = json.loads(files.read_text(folder / VERIFIED_FILE))
        return {name: entry for name, entry in stamp.items() if str(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
