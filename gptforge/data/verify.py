"""Whether prepared data still is what was written, without reading it all at every start.

A stamp in the folder says which files were found intact, and by what (size, times, inode) to see
that nobody wrote to them since. Only files that changed are hashed again.
"""

import contextlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptforge import files
from gptforge.data.index import INDEX, TOKENIZER, Index, hash_of
from gptforge.errors import UserError, reason

STAMP = ".verified"
Stamp = dict[str, dict[str, Any]]


def write_stamp(index: Index) -> None:
    """Note the files of a preparation that was just finished as intact."""
    folder = index.folder
    hashes = {name: files.sha256(folder / name) for name in (INDEX, TOKENIZER)}
    hashes |= _shard_hashes(index)
    _save(folder, {name: _entry(folder / name, digest) for name, digest in hashes.items()})


def find_damage(index: Index, *, max_bytes: int | None = None) -> str | None:
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
            for name in (INDEX, TOKENIZER, *_shard_hashes(index))
            if not _is_unchanged(folder / name, stamp.get(name), index)
        ]
        if not changed:
            return None
        sizes = sum((folder / name).stat().st_size for name in changed)
        if max_bytes is not None and sizes > max_bytes:
            changed = [name for name in changed if name in (INDEX, TOKENIZER)]
        found: Stamp = {name: entry for name, entry in stamp.items() if name not in changed}
        for name in changed:
            digest = files.sha256(folder / name)
            if (wanted := _expected(name, stamp, index)) and digest != wanted:
                return f"{name} is not what {INDEX} says: it was changed or damaged"
            found[name] = _entry(folder / name, digest)
        # One that was made before there were stamps is compared as what it says.
        if TOKENIZER not in stamp and not is_same_tokenizer(index):
            return f"{TOKENIZER} is not the one that the shards were made with"
    except UserError as error:
        return str(error)
    except OSError as error:
        where = Path(str(error.filename or folder)).name
        return f"{where}: {error.strerror or error}"
    except Exception as error:
        # An index from elsewhere may hold anything.
        return f"{INDEX}: {reason(error)}"
    # A folder that is not ours to write to is hashed again the next time.
    with contextlib.suppress(OSError):
        _save(folder, found)
    return None


def is_same_tokenizer(index: Index) -> bool:
    """Whether the tokenizer beside the shards is the one that they were made with."""
    recorded = index.record.get("tokenizer")
    if not isinstance(recorded, Mapping) or "sha256" not in recorded:
        return True
    return hash_of(index.tokenizer().to_json()) == str(recorded["sha256"])


def _shard_hashes(index: Index) -> dict[str, str]:
    return {shard["file"]: str(shard.get("sha256", "")) for shard in index.record["shards"]}


def _expected(name: str, stamp: Stamp, index: Index) -> str:
    if name in (INDEX, TOKENIZER):
        return str(stamp.get(name, {}).get("sha256", ""))
    return _shard_hashes(index)[name]


def _is_unchanged(path: Path, entry: Mapping[str, Any] | None, index: Index) -> bool:
    if entry is None or entry.get("facts") != _facts(path):
        return False
    return path.name in (INDEX, TOKENIZER) or entry["sha256"] == _shard_hashes(index)[path.name]


def _entry(path: Path, digest: str) -> dict[str, Any]:
    return {"sha256": digest, "facts": _facts(path)}


def _facts(path: Path) -> list[int]:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(None, "not a regular file", path.as_posix())
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _save(folder: Path, stamp: Stamp) -> None:
    files.write_atomic(folder / STAMP, json.dumps(stamp, indent=1) + "\n")


def _load(folder: Path) -> Stamp:
    """The stamp of a folder; empty where there is none that can be read."""
    try:
        stamp = json.loads(files.read_small(folder / STAMP))
        return {name: entry for name, entry in stamp.items() if str(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
