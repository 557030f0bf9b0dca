"""What a run learns from: whatever `--input` names, as two streams of tokens."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptforge import tokenizers
from gptforge.data.cache import prepare_cached
from gptforge.data.dataloader import count_sequences, too_short_hint
from gptforge.data.index import TOKENIZER_FILE, Index, find_corruption, read_index
from gptforge.data.prepare.finalize import MAX_FINGERPRINTS
from gptforge.data.prepare.pipeline import PROGRESS_DIR
from gptforge.data.prepare.request import ProgressBar, fingerprint
from gptforge.data.prepare.sources import FileKind
from gptforge.data.prepare.split import split_by_name
from gptforge.data.prepare.text_io import TextFormat
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

SHARD_SUFFIX = ".bin"
EDGE_TOKENS = 2**18
"""Tokens of such a shard, at either end, in which a mark between documents is looked for."""
EDGE_BYTES = 2**16
"""Bytes of a stranger's shard, at either end, that it is known by."""
MAX_VERIFIED_BYTES = 2**32
"""Bytes of changed files in a prepared folder that are hashed before training. What was copied
here, for example, counts as changed; `gptforge doctor` reads any amount."""


@dataclass(frozen=True)
class Dataset:
    """Two streams of tokens, and what is known of them."""

    path: Path
    """As it was named."""
    sha256: str
    """Of one text its own; of more, what stands for the whole."""
    tokenizer: Tokenizer
    tokenizer_name: str
    """What `--tokenizer` would be called with to get it."""
    train: TokenDataset
    val: TokenDataset
    """Empty where nothing is held out."""
    val_fraction: float
    characters: int = 0
    """Of the text; 0 where that is not known."""
    bytes: int = 0
    documents: int = 0
    notices: tuple[str, ...] = ()
    input_splits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The files that it was made of, by fingerprint, and the sides that their text went to."""
    is_split_by_name: bool = False
    """Whether the names of the files say what is held out, and no share."""
    is_prepared: bool = False
    """Whether `prepare` parted it by itself: no flag of training parts it otherwise."""

    @property
    def split_hint(self) -> str:
        """What is to be done to hold out another share of it: behind this comes --val_fraction."""
        return "prepare the text anew with" if self.is_prepared else "use"

    @property
    def prepared_dir(self) -> str:
        """The folder of shards that `prepare` made; empty for anything else."""
        return self.path.as_posix() if self.is_prepared else ""

    @property
    def more_val_hint(self) -> str:
        """What is to be done where too little is held out."""
        if self.is_split_by_name:
            files = "put more text into the files that are held out by their names"
            return f"{files}, or {self.split_hint} --split_by_name false"
        return f"{self.split_hint} a larger --val_fraction, 0, or more text"

    def input_fingerprints(self, split: str) -> set[str]:
        """Fingerprints of the files that text of a side, train or val, comes from."""
        return {name for name, sides in self.input_splits.items() if split in sides}


@dataclass(frozen=True)
class DatasetOptions:
    """How `--input` is to be read."""

    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    raw_bin: bool = False
    require_tokenizer: bool = False
    """Whether shards made with another one are refused, or bring their own."""
    model_tokenizer: str = ""
    """File of the tokenizer, where it is a model's and nobody gave it by a flag."""
    require_val_fraction: bool = False
    needs_val: bool = False
    """Whether files whose names say validation stay apart, though no share is asked for."""
    kind: FileKind | Literal["auto"] = "auto"
    split_by_name: bool = True
    """Whether the names of text files are looked at for splits; those of shards always are."""
    verify: bool = True
    """Whether to compare what `prepare` made with its hashes, where it changed since."""


def open_dataset(
    path: Path,
    options: DatasetOptions,
    *,
    log: Callable[[str], None],
    progress: ProgressBar | None = None,
) -> Dataset:
    """Shards as they lie, anything else prepared first, once.

    Raises:
        UserError: if there is nothing, or it cannot be read, or does not fit what is wanted.
    """
    if path.is_dir() and (index := read_index(path)) is not None:
        return _prepared(path, index, options)
    if path.suffix == SHARD_SUFFIX and path.is_file():
        return _foreign(path, [path], options)
    if (path / PROGRESS_DIR).is_dir():
        raise UserError(
            f"{path.as_posix()} is not finished: the command that prepared it, given again, goes "
            "on where it stopped"
        )
    if path.is_dir() and (shards := sorted(path.glob(f"[!.]*{SHARD_SUFFIX}"))):
        return _foreign(path, shards, options)
    index, notices = prepare_cached(
        path.as_posix(),
        tokenizer=options.tokenizer,
        val_fraction=options.val_fraction,
        form=options.text_format,
        kind=options.kind,
        split_by_name=options.split_by_name,
        for_eval=options.needs_val,
        log=log,
        progress=progress,
    )
    return _of_index(path, index, index.load_tokenizer(), options.tokenizer, notices=notices)


def check_length(dataset: Dataset, context_length: int, *, random_offset: bool = False) -> None:
    """Raise a UserError if either part is too short to be of use."""
    train, path = len(dataset.train), dataset.path.as_posix()
    if random_offset and context_length < train < 2 * context_length:
        raise UserError(
            f"--stagger true needs two windows of --context_length {context_length}; the training "
            f"text has {train} tokens of {path}: leave it out, or use more text"
        )
    if count_sequences(train, context_length) == 0:
        raise UserError(
            f"--context_length {context_length} is longer than the training text, {train} tokens "
            f"of {path}: {too_short_hint(train)}"
        )
    if dataset.val_fraction and len(dataset.val) < 2:
        raise UserError(
            f"--val_fraction {dataset.val_fraction} holds out {len(dataset.val)} token of "
            f"{path}: 2 are needed to judge anything; {dataset.more_val_hint}"
        )


def _prepared(path: Path, index: Index, wanted: DatasetOptions) -> Dataset:
    """A folder that `prepare` made: it brings its tokenizer and its held-out part."""
    damage = find_corruption(index, max_hash_bytes=MAX_VERIFIED_BYTES) if wanted.verify else None
    if damage is not None:
        raise UserError(
            f"{path.as_posix()}: {damage}: the command that prepared it, given again, makes it anew"
        )
    own = index.load_tokenizer()
    if wanted.require_tokenizer and not _is_same(own, wanted.tokenizer):
        which, fix = "the one asked for", "leave --tokenizer out, or prepare the text again with it"
        if wanted.model_tokenizer:
            which = "the model's"
            fix = f"prepare the text again with --tokenizer {quote(wanted.model_tokenizer)}"
        raise UserError(
            f"{path.as_posix()} was prepared with the tokenizer {own.name} ({own.vocab_size} ids), not "
            f"with {which}: {fix}"
        )
    if wanted.require_val_fraction and wanted.val_fraction != index.val_fraction:
        raise UserError(
            f"{path.as_posix()} was prepared with --val_fraction {index.val_fraction}, not "
            f"{wanted.val_fraction}: leave it out, or prepare the text again with it"
        )
    name = own.name if own.name in ("gpt2", "byte") else (path / TOKENIZER_FILE).as_posix()
    return _of_index(path, index, own, name, is_prepared=True)


def _of_index(
    path: Path,
    index: Index,
    own: Tokenizer,
    name: str | Tokenizer,
    *,
    notices: Sequence[str] = (),
    is_prepared: bool = False,
) -> Dataset:
    train, held_out = (
        ShardDataset(index.shards(side), vocab_size=own.vocab_size) for side in ("train", "val")
    )
    return Dataset(
        path=path,
        sha256=index.digest,
        tokenizer=own,
        tokenizer_name=name if isinstance(name, str) else own.name,
        train=train,
        val=held_out,
        val_fraction=index.val_fraction,
        characters=sum(index.total(side, "characters") for side in ("train", "val")),
        bytes=sum(index.total(side, "bytes") for side in ("train", "val")),
        documents=sum(index.total(side, "documents") for side in ("train", "val")),
        notices=(*notices, *index.record.get("notices", ())),
        input_splits=index.inputs,
        is_split_by_name=index.record["split"].get("rule") == "files",
        is_prepared=is_prepared,
    )


def _is_same(own: Tokenizer, wanted: str | Tokenizer) -> bool:
    if wanted in tokenizers.NAMES:
        return own.name == wanted
    other = tokenizers.from_name(wanted, "") if isinstance(wanted, str) else wanted
    return own.to_json() == other.to_json()


def _foreign(path: Path, names: Sequence[Path], wanted: DatasetOptions) -> Dataset:
    """Shards that another program made: `--tokenizer` says with which vocabulary."""
    read = read_raw_bin if wanted.raw_bin else read_shard_header
    shards = [read(name) for name in names]
    notices = []
    tokenizer = wanted.tokenizer
    if not wanted.require_tokenizer:
        if any(shard.dtype.itemsize > 2 for shard in shards):
            raise UserError(
                f"{path.as_posix()}: these shards do not say what vocabulary they were made with: "
                "say it with --tokenizer"
            )
        tokenizer = "gpt2"
        notices.append("the shards are taken for GPT-2's vocabulary: --tokenizer says otherwise")
    if tokenizer == "char":
        raise UserError(
            f"{path.as_posix()}: shards do not say which characters their ids stand for: give "
            "--tokenizer a tokenizer.json"
        )
    known = tokenizers.from_name(tokenizer, "") if isinstance(tokenizer, str) else tokenizer
    learned, judged = _sides_of_shards(shards)
    train = ShardDataset(learned, vocab_size=known.vocab_size)
    is_parted = wanted.val_fraction > 0 or wanted.needs_val
    known = copy.copy(known)
    known.prepends_eot = _has_mark(train, known)
    held_out = ShardDataset(judged if is_parted else [], vocab_size=known.vocab_size)
    sides = {"train": learned, "val": judged}
    if left_out := len(shards) - len(learned) - len(judged):
        notices.append(f"{pluralize(left_out, 'shard', 'shards')} whose name says test: left out")
    if not judged and wanted.val_fraction:
        cut = int(len(train) * (1 - wanted.val_fraction))
        train, held_out = train.subset(0, cut), train.subset(cut, len(train))
        notices.append("no shard has val in its name: the last tokens are held out")
        sides["val"] = learned
    return Dataset(
        path=path,
        sha256=_known_by(shards, judged),
        tokenizer=known,
        tokenizer_name=tokenizer if isinstance(tokenizer, str) else known.name,
        train=train,
        val=held_out,
        val_fraction=wanted.val_fraction,
        notices=tuple(notices),
        input_splits=_inputs(sides),
    )


def _has_mark(tokens: TokenDataset, tokenizer: Tokenizer) -> bool:
    """Whether an end-of-text mark stands at either end of shards of others."""
    mark, length = tokenizer.eot_token, len(tokens)
    if mark is None:
        return False
    try:
        return any(
            bool((part == mark).any())
            for part in (tokens[:EDGE_TOKENS], tokens[max(0, length - EDGE_TOKENS) : length])
        )
    except UserError:
        # Ids that are none of this tokenizer's are told of elsewhere.
        return False


def _sides_of_shards(
    shards: Sequence[ShardFile],
) -> tuple[Sequence[ShardFile], Sequence[ShardFile]]:
    """The shards to learn from and those to judge by, as their names say."""
    named = split_by_name([shard.path for shard in shards], require_train=False)
    judged = [shards[number] for number in named.val]
    learned = [s for i, s in enumerate(shards) if i not in {*named.val, *named.test}]
    # Shards that all say val, or all test, are no split.
    return (learned, judged) if learned else (judged or shards, [])


def _inputs(sides: Mapping[str, Sequence[ShardFile]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for side, shards in sides.items():
        for shard in shards[:MAX_FINGERPRINTS]:
            found.setdefault(fingerprint(shard.path), []).append(side)
    return found


def _known_by(shards: Sequence[ShardFile], judged: Sequence[ShardFile]) -> str:
    """A hash of names, sizes and both ends: enough to tell data sets apart, however large."""
    known = hashlib.sha256()
    by_substring = [shard for shard in shards if "val" in shard.path.stem]
    if judged != by_substring and 0 < len(by_substring) < len(shards):
        # Earlier versions held these out: a run of theirs does not go on with other sides.
        known.update(f"held out: {[shard.path.name for shard in judged]}\n".encode())
    for shard in shards:
        known.update(f"{shard.path.name} {shard.num_tokens}\n".encode())
        with shard.path.open("rb") as file:
            known.update(file.read(EDGE_BYTES))
            file.seek(max(0, shard.path.stat().st_size - EDGE_BYTES))
            known.update(file.read(EDGE_BYTES))
    return known.hexdigest()


PACKAGE_DIR = Path(__file__).resolve().parent
# A checkout keeps the one copy at its root; an installed package has it inside.
BUNDLED_PATHS = (PACKAGE_DIR / "input.txt", PACKAGE_DIR.parents[1] / "input.txt")
BUNDLED_INPUT = "bundled:input.txt"
"""The text that comes with the program, as `--input`: the same wherever the program lies."""


def resolve_input(flag: str) -> Path:
    """What `--input` names, else input.txt here, else Shakespeare from the package."""
    if flag and flag != BUNDLED_INPUT:
        return Path(flag)
    places = BUNDLED_PATHS if flag else (Path("input.txt"), *BUNDLED_PATHS)
    for place in places:
        if place.is_file():
            return place
    where = "with the program" if flag else "here"
    raise UserError(f"there is no input.txt {where}: give a text with --input PATH")


def portable_input_name(path: Path) -> str:
    """What `--input` is called in a configuration that other machines may read."""
    return BUNDLED_INPUT if path in BUNDLED_PATHS else path.as_posix()


def may_be_bundled_input(name: str) -> bool:
    """Whether a name in a run's configuration may be the bundled text, as earlier versions wrote
    it: its path at that time, or input.txt where the program itself was.
    """
    path = Path(name)
    is_named_so = path.name == "input.txt" and (path.is_absolute() or len(path.parts) == 1)
    return is_named_so and not path.exists()
