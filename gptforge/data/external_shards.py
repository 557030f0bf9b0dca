"""Shards of other programs, which say neither their split nor their tokenizer."""

import hashlib
from collections.abc import Mapping, Sequence

from gptforge.data.prepare.finalize import MAX_FINGERPRINTS
from gptforge.data.prepare.request import fingerprint, read_ends
from gptforge.data.prepare.split import split_by_name
from gptforge.data.token_dataset import ShardFile, TokenDataset, edges
from gptforge.errors import UserError


def has_eot(tokens: TokenDataset, eot_token: int | None) -> bool:
    """Whether either end of the tokens contains an end-of-text token."""
    try:
        return any(bool((ids == eot_token).any()) for ids in edges(tokens))
    except UserError:
        return False  # ids outside the vocabulary are reported elsewhere


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


def shards_digest(shards: Sequence[ShardFile], val_shards: Sequence[ShardFile]) -> str:
    """A hash of names, sizes and both ends of all shards: cheap, and distinguishes data sets."""
    digest = hashlib.sha256()
    has_val_in_name = [shard for shard in shards if "val" in shard.path.stem]
    if val_shards != has_val_in_name and 0 < len(has_val_in_name) < len(shards):
        # Earlier versions held these out: their runs must not resume with another split.
        digest.update(f"held out: {[shard.path.name for shard in val_shards]}\n".encode())
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.num_tokens}\n".encode() + read_ends(shard.path))
    return digest.hexdigest()
