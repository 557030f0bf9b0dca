"""What a run learns from: whatever `--input` names, as two streams of tokens."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptforge import tokenizers
from gptforge.data.cached import prepare_once
from gptforge.data.chosen import fingerprint
from gptforge.data.documents import Form
from gptforge.data.finding import counted
from gptforge.data.finishing import MAX_INPUTS
from gptforge.data.index import TOKENIZER, Index, read_index
from gptforge.data.loader import count_windows, remedy_for_few
from gptforge.data.prepare import NOTES
from gptforge.data.request import Meter
from gptforge.data.shards import read_header, read_headerless
from gptforge.data.sources import Kind
from gptforge.data.split_names import split_by_name
from gptforge.data.stream import ShardFile, ShardStream, TokenStream
from gptforge.data.verify import find_damage
from gptforge.errors import UserError
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

SHARDS = ".bin"
LOOK = 2**18
"""Tokens of such a shard, at either end, in which a mark between documents is looked for."""
EDGE = 2**16
"""Bytes of a stranger's shard, at either end, that it is known by."""
HASHED = 2**32
"""Bytes of changed files in a prepared folder that are hashed before training. What was copied
here, for example, counts as changed; `gptforge doctor` reads any amount."""


@dataclass(frozen=True)
class Corpus:
    """Two streams of tokens, and what is known of them."""

    path: Path
    """As it was named."""
    sha256: str
    """Of one text its own; of more, what stands for the whole."""
    tokenizer: Tokenizer
    tokenizer_name: str
    """What `--tokenizer` would be called with to get it."""
    train: TokenStream
    held_out: TokenStream
    """Empty where nothing is held out."""
    val_fraction: float
    characters: int = 0
    """Of the text; 0 where that is not known."""
    bytes: int = 0
    documents: int = 0
    notices: tuple[str, ...] = ()
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The files that it was made of, by fingerprint, and the sides that their text went to."""
    is_held_out_by_name: bool = False
    """Whether the names of the files say what is held out, and no share."""
    is_prepared: bool = False
    """Whether `prepare` parted it by itself: no flag of training parts it otherwise."""

    @property
    def how_to_part(self) -> str:
        """What is to be done to hold out another share of it: behind this comes --val_fraction."""
        return "prepare the text anew with" if self.is_prepared else "use"

    @property
    def prepared_as(self) -> str:
        """The folder of shards that `prepare` made; empty for anything else."""
        return self.path.as_posix() if self.is_prepared else ""

    @property
    def how_to_hold_out_more(self) -> str:
        """What is to be done where too little is held out."""
        if self.is_held_out_by_name:
            files = "put more text into the files that are held out by their names"
            return f"{files}, or {self.how_to_part} --split_by_name false"
        return f"{self.how_to_part} a larger --val_fraction, 0, or more text"

    def inputs_of(self, side: str) -> set[str]:
        """Fingerprints of the files that text of a side, train or val, comes from."""
        return {name for name, sides in self.inputs.items() if side in sides}


@dataclass(frozen=True)
class Wanted:
    """How `--input` is to be read."""

    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    form: Form = field(default_factory=Form)
    headerless: bool = False
    insists_on_tokenizer: bool = False
    """Whether shards made with another one are refused, or bring their own."""
    model_tokenizer: str = ""
    """File of the tokenizer, where it is a model's and nobody gave it by a flag."""
    insists_on_fraction: bool = False
    is_to_judge: bool = False
    """Whether files whose names say validation stay apart, though no share is asked for."""
    kind: Kind | Literal["auto"] = "auto"
    split_by_name: bool = True
    """Whether the names of text files are looked at for splits; those of shards always are."""
    verify: bool = True
    """Whether to compare what `prepare` made with its hashes, where it changed since."""


def open_corpus(
    path: Path, wanted: Wanted, *, say: Callable[[str], None], meter: Meter | None = None
) -> Corpus:
    """Shards as they lie, anything else prepared first, once.

    Raises:
        UserError: if there is nothing, or it cannot be read, or does not fit what is wanted.
    """
    if path.is_dir() and (index := read_index(path)) is not None:
        return _prepared(path, index, wanted)
    if path.suffix == SHARDS and path.is_file():
        return _foreign(path, [path], wanted)
    if (path / NOTES).is_dir():
        raise UserError(
            f"{path.as_posix()} is not finished: the command that prepared it, given again, goes "
            "on where it stopped"
        )
    if path.is_dir() and (shards := sorted(path.glob(f"[!.]*{SHARDS}"))):
        return _foreign(path, shards, wanted)
    index, notices = prepare_once(
        path.as_posix(),
        tokenizer=wanted.tokenizer,
        val_fraction=wanted.val_fraction,
        form=wanted.form,
        kind=wanted.kind,
        split_by_name=wanted.split_by_name,
        is_to_judge=wanted.is_to_judge,
        say=say,
        meter=meter,
    )
    return _of_index(path, index, index.tokenizer(), wanted.tokenizer, notices=notices)


def check_length(corpus: Corpus, context_length: int, *, stagger: bool = False) -> None:
    """Raise a UserError if either part is too short to be of use."""
    train, path = len(corpus.train), corpus.path.as_posix()
    if stagger and context_length < train < 2 * context_length:
        raise UserError(
            f"--stagger true needs two windows of --context_length {context_length}; the training "
            f"text has {train} tokens of {path}: leave it out, or use more text"
        )
    if count_windows(train, context_length) == 0:
        raise UserError(
            f"--context_length {context_length} is longer than the training text, {train} tokens "
            f"of {path}: {remedy_for_few(train)}"
        )
    if corpus.val_fraction and len(corpus.held_out) < 2:
        raise UserError(
            f"--val_fraction {corpus.val_fraction} holds out {len(corpus.held_out)} token of "
            f"{path}: 2 are needed to judge anything; {corpus.how_to_hold_out_more}"
        )


def _prepared(path: Path, index: Index, wanted: Wanted) -> Corpus:
    """A folder that `prepare` made: it brings its tokenizer and its held-out part."""
    damage = find_damage(index, max_bytes=HASHED) if wanted.verify else None
    if damage is not None:
        raise UserError(
            f"{path.as_posix()}: {damage}: the command that prepared it, given again, makes it anew"
        )
    own = index.tokenizer()
    if wanted.insists_on_tokenizer and not _is_same(own, wanted.tokenizer):
        which, fix = "the one asked for", "leave --tokenizer out, or prepare the text again with it"
        if wanted.model_tokenizer:
            which = "the model's"
            fix = f"prepare the text again with --tokenizer {quote(wanted.model_tokenizer)}"
        raise UserError(
            f"{path.as_posix()} was prepared with the tokenizer {own.name} ({own.size} ids), not "
            f"with {which}: {fix}"
        )
    if wanted.insists_on_fraction and wanted.val_fraction != index.val_fraction:
        raise UserError(
            f"{path.as_posix()} was prepared with --val_fraction {index.val_fraction}, not "
            f"{wanted.val_fraction}: leave it out, or prepare the text again with it"
        )
    name = own.name if own.name in ("gpt2", "byte") else (path / TOKENIZER).as_posix()
    return _of_index(path, index, own, name, is_prepared=True)


def _of_index(
    path: Path,
    index: Index,
    own: Tokenizer,
    name: str | Tokenizer,
    *,
    notices: Sequence[str] = (),
    is_prepared: bool = False,
) -> Corpus:
    train, held_out = (ShardStream(index.shards(side), size=own.size) for side in ("train", "val"))
    return Corpus(
        path=path,
        sha256=index.digest,
        tokenizer=own,
        tokenizer_name=name if isinstance(name, str) else own.name,
        train=train,
        held_out=held_out,
        val_fraction=index.val_fraction,
        characters=sum(index.total(side, "characters") for side in ("train", "val")),
        bytes=sum(index.total(side, "bytes") for side in ("train", "val")),
        documents=sum(index.total(side, "documents") for side in ("train", "val")),
        notices=(*notices, *index.record.get("notices", ())),
        inputs=index.inputs,
        is_held_out_by_name=index.record["split"].get("rule") == "files",
        is_prepared=is_prepared,
    )


def _is_same(own: Tokenizer, wanted: str | Tokenizer) -> bool:
    if wanted in tokenizers.NAMES:
        return own.name == wanted
    other = tokenizers.named(wanted, "") if isinstance(wanted, str) else wanted
    return own.to_json() == other.to_json()


def _foreign(path: Path, names: Sequence[Path], wanted: Wanted) -> Corpus:
    """Shards that another program made: `--tokenizer` says with which vocabulary."""
    read = read_headerless if wanted.headerless else read_header
    shards = [read(name) for name in names]
    notices = []
    tokenizer = wanted.tokenizer
    if not wanted.insists_on_tokenizer:
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
    known = tokenizers.named(tokenizer, "") if isinstance(tokenizer, str) else tokenizer
    learned, judged = _sides_of_shards(shards)
    train = ShardStream(learned, size=known.size)
    is_parted = wanted.val_fraction > 0 or wanted.is_to_judge
    known = copy.copy(known)
    known.marks_documents = _has_mark(train, known)
    held_out = ShardStream(judged if is_parted else [], size=known.size)
    sides = {"train": learned, "val": judged}
    if left_out := len(shards) - len(learned) - len(judged):
        notices.append(f"{counted(left_out, 'shard', 'shards')} whose name says test: left out")
    if not judged and wanted.val_fraction:
        cut = int(len(train) * (1 - wanted.val_fraction))
        train, held_out = train.part(0, cut), train.part(cut, len(train))
        notices.append("no shard has val in its name: the last tokens are held out")
        sides["val"] = learned
    return Corpus(
        path=path,
        sha256=_known_by(shards, judged),
        tokenizer=known,
        tokenizer_name=tokenizer if isinstance(tokenizer, str) else known.name,
        train=train,
        held_out=held_out,
        val_fraction=wanted.val_fraction,
        notices=tuple(notices),
        inputs=_inputs(sides),
    )


def _has_mark(tokens: TokenStream, tokenizer: Tokenizer) -> bool:
    """Whether an end-of-text mark stands at either end of shards of others."""
    mark, length = tokenizer.end_of_text, len(tokens)
    if mark is None:
        return False
    try:
        return any(
            bool((part == mark).any())
            for part in (tokens[:LOOK], tokens[max(0, length - LOOK) : length])
        )
    except UserError:
        # Ids that are none of this tokenizer's are told of elsewhere.
        return False


def _sides_of_shards(
    shards: Sequence[ShardFile],
) -> tuple[Sequence[ShardFile], Sequence[ShardFile]]:
    """The shards to learn from and those to judge by, as their names say."""
    named = split_by_name([shard.path for shard in shards], needs_train=False)
    judged = [shards[number] for number in named.val]
    learned = [s for i, s in enumerate(shards) if i not in {*named.val, *named.test}]
    # Shards that all say val, or all test, are no split.
    return (learned, judged) if learned else (judged or shards, [])


def _inputs(sides: Mapping[str, Sequence[ShardFile]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for side, shards in sides.items():
        for shard in shards[:MAX_INPUTS]:
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
        known.update(f"{shard.path.name} {shard.tokens}\n".encode())
        with shard.path.open("rb") as file:
            known.update(file.read(EDGE))
            file.seek(max(0, shard.path.stat().st_size - EDGE))
            known.update(file.read(EDGE))
    return known.hexdigest()
