"""`--input` as a dataset: token shards as they are, any text tokenized once and cached."""

import contextlib
import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptforge import tokenizers
from gptforge.data.cache import prepare_cached
from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.prepare.finalize import MAX_FINGERPRINTS
from gptforge.data.prepare.pipeline import PROGRESS_DIR
from gptforge.data.prepare.request import (
    ProgressBar,
    TextOptions,
    describe_unused_flags,
    describe_unused_fraction,
    find_shards,
    fingerprint,
    read_ends,
)
from gptforge.data.prepare.split import split_shards
from gptforge.data.shard_index import SPLITS, TOKENIZER_FILE, Index, find_corruption, read_index
from gptforge.data.token_dataset import (
    ShardDataset,
    ShardFile,
    TokenDataset,
    cut_shards,
    edges,
    read_raw_bin,
    read_shard_header,
)
from gptforge.errors import UserError
from gptforge.printable import pluralize
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

PACKAGE_DIR = Path(__file__).resolve().parent
# An installed package contains the bundled text; a checkout has it at its root.
BUNDLED_PATHS = (PACKAGE_DIR / "input.txt", PACKAGE_DIR.parents[1] / "input.txt")
BUNDLED_INPUT = "bundled:input.txt"  # its `--input`, wherever the program is installed
# Bytes of changed files in a prepared folder that are hashed before training; copying a folder
# changes all its files. `gptforge doctor` hashes any amount.
MAX_VERIFIED_BYTES = 2**32


@dataclass(frozen=True)
class Dataset:
    """Train and validation tokens."""

    path: Path  # the `--input`
    sha256: str  # of a single text; of several files, a hash over all of them
    tokenizer: Tokenizer
    tokenizer_name: str  # the `--tokenizer` that gives this tokenizer
    train: TokenDataset
    val: TokenDataset  # empty if nothing is held out
    val_fraction: float
    characters: int = 0  # of the text, like `bytes` and `documents`; 0 if unknown
    bytes: int = 0
    documents: int = 0
    notices: tuple[str, ...] = ()
    input_splits: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by file fingerprint
    is_split_by_name: bool = False  # file names decide what is held out
    is_prepared: bool = False  # by `gptforge prepare`, which also fixed the split

    @property
    def split_hint(self) -> str:
        """How to change the split, before the flag that does."""
        return "prepare the text again with" if self.is_prepared else "use"

    @property
    def prepared_dir(self) -> str:
        """The folder that `gptforge prepare` wrote; empty for other data."""
        return self.path.as_posix() if self.is_prepared else ""

    @property
    def more_val_hint(self) -> str:
        """How to hold out more."""
        if self.is_split_by_name:
            return (
                "put more text into the files that are held out by their names, or "
                f"{self.split_hint} --split_by_name false"
            )
        return f"{self.split_hint} a larger --val_fraction, 0, or more text"

    def input_fingerprints(self, split: str) -> set[str]:
        """Fingerprints of the files with text in a split, train or val."""
        return {name for name, splits in self.input_splits.items() if split in splits}

    def known_to(self, state: Mapping[str, Any], val_fraction: float) -> str:
        """What a run was trained on of the text to evaluate, by its state and `--val_fraction`.

        That is the validation split, or all if there is none. Empty if nothing of it is known.
        """
        name, split = self.path.as_posix(), "val" if len(self.val) else "train"
        if state["text_sha256"] == self.sha256:
            # A smaller validation split of the same text is part of a larger one.
            return "" if split == "val" and self.val_fraction <= val_fraction else name
        inputs = state.get("inputs")
        inputs = map(str, inputs if isinstance(inputs, list) else ())
        known = self.input_fingerprints(split).intersection(inputs)
        if len(self.input_splits) > 1:
            name = f"{pluralize(len(known), 'file')} of {name}"
        return f"{name}, or on a part of it" if known else ""


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(TextOptions):
    """How to read `--input`."""

    require_tokenizer: bool = False  # refuse shards of another one instead of using theirs
    model_tokenizer: str = ""  # file of the tokenizer if it is a model's, not from a flag
    require_val_fraction: bool = False  # refuse prepared data with another one
    verify: bool = True  # compare changed files of prepared data with their hashes


def resolve_input(flag: str) -> Path:
    """The path of `--input`; by default ./input.txt if it exists, otherwise the bundled text."""
    if flag and flag != BUNDLED_INPUT:
        return Path(flag)
    candidates = BUNDLED_PATHS if flag else (Path("input.txt"), *BUNDLED_PATHS)
    if (path := next(filter(Path.is_file, candidates), None)) is None:
        where = "with the program" if flag else "here"
        raise UserError(f"there is no input.txt {where}: give a text with --input PATH")
    return path


def portable_input_name(path: Path) -> str:
    """`--input` in a configuration that other machines may read."""
    return BUNDLED_INPUT if path in BUNDLED_PATHS else path.as_posix()


def may_be_bundled_input(name: str) -> bool:
    """Whether an earlier version may have written this `--input` for the bundled text.

    Those wrote its path, or input.txt if the working folder was that of the program.
    """
    path = Path(name)
    is_candidate = path.name == "input.txt" and (path.is_absolute() or len(path.parts) == 1)
    return is_candidate and not path.exists()


def open_dataset(
    path: Path, options: DatasetOptions, *, progress: ProgressBar | None = None
) -> Dataset:
    """Open token shards; tokenize any other input, unless the cache has its shards.

    Raises:
        UserError: if there is nothing, or it is unreadable, or contradicts the options.
    """
    if path.is_dir() and (index := read_index(path)) is not None:
        return _open_prepared(path, index, options)
    if (path / PROGRESS_DIR).is_dir():
        name = path.as_posix()
        raise UserError(f"{name} is not finished: run the command that prepared it again to resume")
    if shards := find_shards(path):
        return _open_shards(path, shards, options)
    index, notices = prepare_cached(options.request(path), progress=progress)
    return _from_index(path, index, index.load_tokenizer(), options.tokenizer, notices=notices)


def check_length(dataset: Dataset, context_length: int, *, random_offset: bool = False) -> None:
    """Raise a UserError if a split is too short for a sequence."""
    train, path = len(dataset.train), dataset.path.as_posix()
    if random_offset and context_length < train < 2 * context_length:
        raise UserError(
            f"--random_offset true needs two sequences of --context_length {context_length}; the "
            f"training text has {train} tokens of {path}: use --random_offset false, a shorter "
            "--context_length, or more text"
        )
    if count_sequences(train, context_length) == 0:
        tokens = pluralize(train, "token")
        size = f"the training text, {tokens} of {path}: {too_short_hint(train)}"
        raise UserError(f"--context_length {context_length} is longer than {size}")
    if dataset.val_fraction and len(dataset.val) < 2:
        size = f"--val_fraction {dataset.val_fraction} holds out {len(dataset.val)} token"
        hint = f"a validation loss needs 2; {dataset.more_val_hint}"
        raise UserError(f"{size} of {path}: {hint}")


def _open_prepared(path: Path, index: Index, options: DatasetOptions) -> Dataset:
    """A folder that `gptforge prepare` wrote, with its tokenizer and its split."""
    name = path.as_posix()
    if options.verify and (problem := find_corruption(index, max_hash_bytes=MAX_VERIFIED_BYTES)):
        raise UserError(f"{name}: {problem}: run the command that prepared it to write it again")
    tokenizer = index.load_tokenizer()
    if options.require_tokenizer and not _is_same(tokenizer, options.tokenizer):
        other = "the requested one"
        hint = "leave --tokenizer out, or prepare the text again with it"
        if options.model_tokenizer:
            other = "the model's"
            hint = f"prepare the text again with --tokenizer {quote(options.model_tokenizer)}"
        found = f"{tokenizer.name} ({tokenizer.vocab_size} ids), not with {other}"
        raise UserError(f"{name} was prepared with the tokenizer {found}: {hint}")
    if options.require_val_fraction and options.val_fraction != index.val_fraction:
        found = f"--val_fraction {index.val_fraction}, not {options.val_fraction}"
        hint = "leave it out, or prepare the text again with it"
        raise UserError(f"{name} was prepared with {found}: {hint}")
    is_named = tokenizer.name in ("gpt2", "byte")
    tokenizer_name = tokenizer.name if is_named else (path / TOKENIZER_FILE).as_posix()
    notices = describe_unused_flags(options, ())
    if options.raw_bin:
        notices.append("--raw_bin has no effect: index.json says how the shards are stored")
    return _from_index(path, index, tokenizer, tokenizer_name, notices=notices, is_prepared=True)


def _is_same(tokenizer: Tokenizer, other: str | Tokenizer) -> bool:
    if other in tokenizers.NAMES:
        return tokenizer.name == other
    return tokenizer.to_json() == _load(other).to_json()


def _load(tokenizer: str | Tokenizer) -> Tokenizer:
    return tokenizers.from_name(tokenizer, "") if isinstance(tokenizer, str) else tokenizer


def _from_index(
    path: Path,
    index: Index,
    tokenizer: Tokenizer,
    tokenizer_name: str | Tokenizer,
    *,
    notices: Sequence[str] = (),
    is_prepared: bool = False,
) -> Dataset:
    vocab_size = tokenizer.vocab_size
    quantities = ("characters", "bytes", "documents")
    totals = {q: sum(index.total(split, q) for split in SPLITS) for q in quantities}
    return Dataset(
        path=path,
        sha256=index.record["digest"],
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_name if isinstance(tokenizer_name, str) else tokenizer.name,
        train=ShardDataset(index.shards("train"), vocab_size=vocab_size),
        val=ShardDataset(index.shards("val"), vocab_size=vocab_size),
        val_fraction=index.val_fraction,
        **totals,
        notices=(*notices, *index.record.get("notices", ())),
        input_splits=index.record.get("inputs", {}),
        is_split_by_name=index.record["split"].get("rule") == "files",
        is_prepared=is_prepared,
    )


def _open_shards(path: Path, paths: Sequence[Path], options: DatasetOptions) -> Dataset:
    """Shards of another program; `--tokenizer` names their vocabulary."""
    name = path.as_posix()
    read = read_raw_bin if options.raw_bin else read_shard_header
    shards = [read(path) for path in paths]
    tokenizer_name, notices = options.tokenizer, describe_unused_flags(options, ())
    if not options.require_tokenizer:
        tokenizer_path = paths[0].parent / TOKENIZER_FILE
        hint = f" {quote(tokenizer_path.as_posix())}" if tokenizer_path.is_file() else ""
        if hint or any(shard.dtype.itemsize > 2 for shard in shards):
            problem = "these shards do not say which tokenizer they were made with"
            raise UserError(f"{name}: {problem}: name it with --tokenizer{hint}")
        tokenizer_name = "gpt2"
        notices.append("assuming GPT-2's vocabulary for the shards: --tokenizer names another")
    if tokenizer_name in ("char", "bpe"):
        problem = "shards do not say which text their ids stand for"
        raise UserError(f"{name}: {problem}: give --tokenizer a tokenizer.json")
    tokenizer = copy.copy(_load(tokenizer_name))
    train_shards, val_shards = ([shards[i] for i in part] for part in split_shards(paths))
    notices += describe_unused_fraction(options, has_named=bool(val_shards))
    if num_ignored := len(shards) - len(train_shards) - len(val_shards):
        ignored = pluralize(num_ignored, "shard")
        notices.append(f"{ignored} whose name says test: left out")
    train = ShardDataset(train_shards, vocab_size=tokenizer.vocab_size)
    with contextlib.suppress(UserError):  # ids outside the vocabulary are reported elsewhere
        tokenizer.prepends_eot = any((i == tokenizer.eot_token).any() for i in edges(train))
    holds_out = options.val_fraction > 0 or options.needs_val
    val = ShardDataset(val_shards if holds_out else [], vocab_size=tokenizer.vocab_size)
    splits = {"train": train_shards, "val": val_shards}
    if not val_shards and options.val_fraction:
        parts = cut_shards(train_shards, int(len(train) * (1 - options.val_fraction)))
        train, val = (ShardDataset(part, vocab_size=tokenizer.vocab_size) for part in parts)
        notices.append("no shard has val in its name: the last tokens are held out")
        splits["val"] = train_shards
    return Dataset(
        path=path,
        sha256=_shards_digest(shards, val_shards),
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_name if isinstance(tokenizer_name, str) else tokenizer.name,
        train=train,
        val=val,
        val_fraction=options.val_fraction,
        notices=tuple(notices),
        input_splits=_shard_splits(splits),
    )


def _shard_splits(shards: Mapping[str, Sequence[ShardFile]]) -> dict[str, list[str]]:
    """The splits that have tokens of each shard, by its fingerprint."""
    splits: dict[str, list[str]] = {}
    for split, members in shards.items():
        for shard in members[:MAX_FINGERPRINTS]:
            splits.setdefault(fingerprint(shard.path), []).append(split)
    return splits


def _shards_digest(shards: Sequence[ShardFile], val_shards: Sequence[ShardFile]) -> str:
    """A hash of names, sizes and both ends of all shards: cheap, and distinguishes data sets."""
    digest = hashlib.sha256()
    has_val_in_name = [shard for shard in shards if "val" in shard.path.stem]
    if val_shards != has_val_in_name and 0 < len(has_val_in_name) < len(shards):
        # Version 0.1 held these out: its runs must not resume with another split.
        digest.update(f"held out: {[shard.path.name for shard in val_shards]}\n".encode())
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.num_tokens}\n".encode() + read_ends(shard.path))
    return digest.hexdigest()
