"""`--input` as a dataset: token shards as they are, any text tokenized once and cached."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptforge import tokenizers
from gptforge.data.cache import prepare_cached
from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.prepare.finalize import MAX_FINGERPRINTS
from gptforge.data.prepare.pipeline import PROGRESS_DIR
from gptforge.data.prepare.request import ProgressBar, fingerprint
from gptforge.data.prepare.sources import FileKind
from gptforge.data.prepare.split import split_by_name
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import (
    TOKENIZER_FILE,
    Index,
    find_corruption,
    read_index,
)
from gptforge.data.token_dataset import (
    ShardDataset,
    ShardFile,
    TokenDataset,
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
SHARD_SUFFIX = ".bin"
EDGE_TOKENS = 2**18  # searched for end-of-text tokens at either end of external shards
EDGE_BYTES = 2**16  # hashed at either end of a external shard
# Bytes of changed files in a prepared folder that are hashed before training; copying a folder
# changes all its files. `gptforge doctor` hashes any amount.
MAX_VERIFIED_BYTES = 2**32


@dataclass(frozen=True)
class Dataset:
    """Train and validation tokens.

    Attributes:
        path: the `--input`.
        sha256: of a single text; of several files, a hash over all of them.
        tokenizer_name: the `--tokenizer` that gives this tokenizer.
        val: empty if nothing is held out.
        characters: of the text, like `bytes` and `documents`; 0 if unknown.
        input_splits: by the fingerprint of each input file, the splits that have text of it.
        is_split_by_name: whether file names decide what is held out.
        is_prepared: whether `gptforge prepare` wrote it, which also fixed the split.
    """

    path: Path
    sha256: str
    tokenizer: Tokenizer
    tokenizer_name: str
    train: TokenDataset
    val: TokenDataset
    val_fraction: float
    characters: int = 0
    bytes: int = 0
    documents: int = 0
    notices: tuple[str, ...] = ()
    input_splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_split_by_name: bool = False
    is_prepared: bool = False

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


@dataclass(frozen=True)
class DatasetOptions:
    """How to read `--input`.

    Attributes:
        require_tokenizer: refuse shards of another tokenizer instead of using theirs.
        vocab_size: ids that the tokenizer bpe learns; 0: by the size of the text.
        model_tokenizer: file of the tokenizer if it is a model's, not from a flag.
        require_val_fraction: refuse prepared data with another one.
        needs_val: keep files apart whose names say validation, even if val_fraction is 0.
        split_by_name: whether names of text files decide the split; those of shards always do.
        verify: compare changed files of prepared data with their hashes.
    """

    tokenizer: str | Tokenizer = "gpt2"
    vocab_size: int = 0
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    raw_bin: bool = False
    require_tokenizer: bool = False
    model_tokenizer: str = ""
    require_val_fraction: bool = False
    needs_val: bool = False
    kind: FileKind | Literal["auto"] = "auto"
    split_by_name: bool = True
    verify: bool = True


def resolve_input(flag: str) -> Path:
    """The path of `--input`; by default ./input.txt if it exists, otherwise the bundled text."""
    if flag and flag != BUNDLED_INPUT:
        return Path(flag)
    candidates = BUNDLED_PATHS if flag else (Path("input.txt"), *BUNDLED_PATHS)
    for path in candidates:
        if path.is_file():
            return path
    where = "with the program" if flag else "here"
    raise UserError(f"there is no input.txt {where}: give a text with --input PATH")


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
    if path.suffix == SHARD_SUFFIX and path.is_file():
        return _open_shards(path, [path], options)
    if (path / PROGRESS_DIR).is_dir():
        raise UserError(
            f"{path.as_posix()} is not finished: run the command that prepared it again to resume"
        )
    if path.is_dir() and (shards := sorted(path.glob(f"[!.]*{SHARD_SUFFIX}"))):
        return _open_shards(path, shards, options)
    index, notices = prepare_cached(
        path.as_posix(),
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        val_fraction=options.val_fraction,
        text_format=options.text_format,
        kind=options.kind,
        split_by_name=options.split_by_name,
        needs_val=options.needs_val,
        progress=progress,
    )
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
        raise UserError(
            f"--context_length {context_length} is longer than the training text, {train} tokens "
            f"of {path}: {too_short_hint(train)}"
        )
    if dataset.val_fraction and len(dataset.val) < 2:
        raise UserError(
            f"--val_fraction {dataset.val_fraction} holds out {len(dataset.val)} token of {path}: "
            f"a validation loss needs 2; {dataset.more_val_hint}"
        )


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
        raise UserError(
            f"{name} was prepared with the tokenizer {tokenizer.name} ({tokenizer.vocab_size} "
            f"ids), not with {other}: {hint}"
        )
    if options.require_val_fraction and options.val_fraction != index.val_fraction:
        raise UserError(
            f"{name} was prepared with --val_fraction {index.val_fraction}, not "
            f"{options.val_fraction}: leave it out, or prepare the text again with it"
        )
    is_builtin = tokenizer.name in ("gpt2", "byte")
    tokenizer_name = tokenizer.name if is_builtin else (path / TOKENIZER_FILE).as_posix()
    return _from_index(path, index, tokenizer, tokenizer_name, is_prepared=True)


def _is_same(tokenizer: Tokenizer, other: str | Tokenizer) -> bool:
    if other in tokenizers.NAMES:
        return tokenizer.name == other
    other = tokenizers.from_name(other, "") if isinstance(other, str) else other
    return tokenizer.to_json() == other.to_json()


def _from_index(
    path: Path,
    index: Index,
    tokenizer: Tokenizer,
    tokenizer_name: str | Tokenizer,
    *,
    notices: Sequence[str] = (),
    is_prepared: bool = False,
) -> Dataset:
    train, val = (
        ShardDataset(index.shards(split), vocab_size=tokenizer.vocab_size)
        for split in ("train", "val")
    )
    totals = {
        quantity: index.total("train", quantity) + index.total("val", quantity)
        for quantity in ("characters", "bytes", "documents")
    }
    return Dataset(
        path=path,
        sha256=index.digest,
        tokenizer=tokenizer,
        tokenizer_name=tokenizer_name if isinstance(tokenizer_name, str) else tokenizer.name,
        train=train,
        val=val,
        val_fraction=index.val_fraction,
        **totals,
        notices=(*notices, *index.record.get("notices", ())),
        input_splits=index.input_splits,
        is_split_by_name=index.record["split"].get("rule") == "files",
        is_prepared=is_prepared,
    )


def _open_shards(path: Path, names: Sequence[Path], options: DatasetOptions) -> Dataset:
    """Shards of another program; `--tokenizer` names their vocabulary."""
    read = read_raw_bin if options.raw_bin else read_shard_header
    shards = [read(name) for name in names]
    notices = []
    tokenizer_name = options.tokenizer
    if not options.require_tokenizer:
        if any(shard.dtype.itemsize > 2 for shard in shards):
            raise UserError(
                f"{path.as_posix()}: these shards do not say which tokenizer they were made with: "
                "name it with --tokenizer"
            )
        tokenizer_name = "gpt2"
        notices.append("assuming GPT-2's vocabulary for the shards: --tokenizer names another")
    if tokenizer_name in ("char", "bpe"):
        raise UserError(
            f"{path.as_posix()}: shards do not say which text their ids stand for: give "
            "--tokenizer a tokenizer.json"
        )
    if isinstance(tokenizer_name, str):
        tokenizer = tokenizers.from_name(tokenizer_name, "")
    else:
        tokenizer = copy.copy(tokenizer_name)
    train_shards, val_shards = _split_shards(shards)
    if num_ignored := len(shards) - len(train_shards) - len(val_shards):
        notices.append(
            f"{pluralize(num_ignored, 'shard', 'shards')} whose name says test: left out"
        )
    train = ShardDataset(train_shards, vocab_size=tokenizer.vocab_size)
    tokenizer.prepends_eot = _has_eot(train, tokenizer)
    holds_out = options.val_fraction > 0 or options.needs_val
    val = ShardDataset(val_shards if holds_out else [], vocab_size=tokenizer.vocab_size)
    splits = {"train": train_shards, "val": val_shards}
    if not val_shards and options.val_fraction:
        cut = int(len(train) * (1 - options.val_fraction))
        train, val = train.subset(0, cut), train.subset(cut, len(train))
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
        input_splits=_input_splits(splits),
    )


def _has_eot(tokens: TokenDataset, tokenizer: Tokenizer) -> bool:
    """Whether either end of external shards contains an end-of-text token."""
    eot, length = tokenizer.eot_token, len(tokens)
    if eot is None:
        return False
    try:
        ends = (tokens[:EDGE_TOKENS], tokens[max(0, length - EDGE_TOKENS) : length])
        return any(bool((end == eot).any()) for end in ends)
    except UserError:
        return False  # ids outside the vocabulary are reported elsewhere


def _split_shards(
    shards: Sequence[ShardFile],
) -> tuple[Sequence[ShardFile], Sequence[ShardFile]]:
    """Train and validation shards, by their names."""
    named = split_by_name([shard.path for shard in shards], require_train=False)
    val = [shards[i] for i in named.val]
    train = [shard for i, shard in enumerate(shards) if i not in {*named.val, *named.test}]
    # If all names say val, or test, they are not a split.
    return (train, val) if train else (val or shards, [])


def _input_splits(splits: Mapping[str, Sequence[ShardFile]]) -> dict[str, list[str]]:
    by_fingerprint: dict[str, list[str]] = {}
    for split, shards in splits.items():
        for shard in shards[:MAX_FINGERPRINTS]:
            by_fingerprint.setdefault(fingerprint(shard.path), []).append(split)
    return by_fingerprint


def _shards_digest(shards: Sequence[ShardFile], val_shards: Sequence[ShardFile]) -> str:
    """A hash of names, sizes and both ends of all shards: cheap, and distinguishes data sets."""
    digest = hashlib.sha256()
    has_val_in_name = [shard for shard in shards if "val" in shard.path.stem]
    if val_shards != has_val_in_name and 0 < len(has_val_in_name) < len(shards):
        # Earlier versions held these out: their runs must not resume with another split.
        digest.update(f"held out: {[shard.path.name for shard in val_shards]}\n".encode())
    for shard in shards:
        digest.update(f"{shard.path.name} {shard.num_tokens}\n".encode())
        with shard.path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, shard.path.stat().st_size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()
