"""Shards of other programs, which say neither their split nor their tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence

from gptforge.data.prepare.finalize import MAX_FINGERPRINTS
from gptforge.data.prepare.request import fingerprint, read_ends
from gptforge.data.prepare.split import split_by_name
from gptforge.data.token_dataset import ShardFile


def split_shards(shards: Sequence[ShardFile]) -> tuple[Sequence[ShardFile], Sequence[ShardFile]]:
    """Train and validation shards, by their names."""
    named = split_by_name([shard.path for shard in shards], require_train=False)
    val = [shards[i] for i in named.val]
    train = [shard for i, shard in enumerate(shards) if i not in {*named.val, *named.test}]
    # If all names say val, or test, they are not a split.
    return (train, val) if train else (val or shards, [])


def shard_splits(shards: Mapping[str, Sequence[ShardFile]]) -> dict[str, list[str]]:
    """The splits that have tokens of each shard, by its fingerprint."""
    splits: dict[str, list[str]] = {}
    for split, members in shards.items():
        for shard in members[:MAX_FINGERPRINTS]:
            splits.setdefault(fingerprint(shard.path), []).append(split)
    return splits


def shards_digest(shards: Sequence[ShardFile]) -> str:
    """A hash of names, sizes and both ends of all shards: cheap, and distinguishes data sets."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.num_tokens}\n".encode() + read_ends(shard.path))
    return digest.hexdigest()
