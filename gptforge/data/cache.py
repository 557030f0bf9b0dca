"""Tokenize a text only once: a cache of shards by content, and of texts given from Python."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from gptforge import files, tokenizers
from gptforge.data.input_errors import BadInputError
from gptforge.data.prepare.pipeline import (
    PREPARE_VERSION,
    REQUEST_FILE,
    learn_bpe,
    no_skip_of_only_file,
    prepare,
)
from gptforge.data.prepare.request import (
    RAW_BIN_UNUSED,
    FileSelection,
    PrepareRequest,
    ProgressBar,
    TextOptions,
    select_files,
)
from gptforge.data.prepare.scan import scan
from gptforge.data.prepare.sources import is_pipe
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import Index, json_sha256
from gptforge.errors import RunError, UserError
from gptforge.estimate.formulas import LEARNED_VOCAB_SIZES
from gptforge.lock import LOCK_FILE, lock_folder
from gptforge.printable import short_repr
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

CACHE_VERSION = 2  # raise it when the index says more: older entries are prepared again
MAX_AGE_DAYS = 90  # unused data is deleted after that: it can be prepared again
BPE_PREFIX = "bpe-"  # of the tokenizers that were learned from texts
SPOOL_PREFIX = ".pipe-"  # of folders for the content of pipes
TEXT_PREFIX = "text-"  # of texts that were given from Python

Texts = str | Iterable[str] | Iterable[Mapping[str, object]]


def prepare_cached(
    request: PrepareRequest, *, progress: ProgressBar | None = None
) -> tuple[Index, tuple[str, ...]]:
    """Prepare one file, folder or pattern, or find its shards in the cache.

    The same content has the same shards, whatever its path.

    Returns:
        The index, and what the user should know about the choice of files.

    Raises:
        UserError: if it cannot be read; the message says how `gptforge prepare` would read it.
        RunError: if the disk of the cache is full.
    """
    cache = writable_cache()
    with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=cache) as spool:
        spool_dir = Path(spool) if is_pipe(Path(request.names[0])) else None
        selection = select_files(request, spool_dir=spool_dir)
        if request.raw_bin:
            selection = replace(selection, notices=(*selection.notices, RAW_BIN_UNUSED))
            request = replace(request, raw_bin=False)
        contents = [[s.kind, s.compression, files.sha256(s.path)] for s in selection.sources]
        options = [CACHE_VERSION, request.val_fraction, request.split_by_name]
        options += selection.val_sources

        def key_of(vocab: object) -> str:
            text_format = asdict(request.text_format)
            return json_sha256([PREPARE_VERSION, contents, vocab, options, text_format])

        with _hints_for(request):
            if request.tokenizer == "bpe":
                num_ids = request.vocab_size or LEARNED_VOCAB_SIZES
                name = f"{BPE_PREFIX}{key_of(['bpe', num_ids])[:24]}"
                # The shards' key has this tokenizer: a resumed run, which has it, finds them.
                learned = _learn_bpe_cached(request, selection, cache, name, Path(spool))
                request = replace(request, tokenizer=learned)
            tokenizer = request.tokenizer
            vocab = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
            if isinstance(vocab, str) and Path(vocab).is_file():
                vocab = files.sha256(Path(vocab))
            cache_key = key_of(vocab)
            folder = cache / cache_key[:24]
            request = replace(request, selection=selection, cache_key=cache_key)
            index = prepare(folder, request, wait=True, progress=progress)
    (folder / REQUEST_FILE).touch()
    # By the clock of the file system, which may not be that of this machine.
    _delete_unused(cache, now=(folder / REQUEST_FILE).stat().st_mtime)
    return index, selection.notices


def _learn_bpe_cached(
    request: PrepareRequest, selection: FileSelection, cache: Path, name: str, scratch: Path
) -> Tokenizer:
    """Learn a tokenizer from the training split, or load it if that was done before."""
    # The hash of its content is part of the file's name, so that damage is noticed.
    for path in cache.glob(f"{name}-*.json"):
        with contextlib.suppress(OSError, UserError):
            if path.stem == f"{name}-{files.sha256(path)[:16]}":
                tokenizer = tokenizers.load(path)
                path.touch()
                return tokenizer
        logger.warning(f"warning: {path.as_posix()} was damaged: learning the tokenizer again")
        files.remove(path)
    with no_skip_of_only_file(selection.sources):
        rule = scan(request, selection).split_rule
        learned = learn_bpe(request, selection.sources, rule)
    path = scratch / "learned"
    tokenizers.save(learned, path)
    path.replace(cache / f"{name}-{files.sha256(path)[:16]}.json")
    return learned


@contextlib.contextmanager
def _hints_for(request: PrepareRequest) -> Iterator[None]:
    """Add to errors what `train` and `eval` can do about them."""
    try:
        yield
    except BadInputError as error:
        message = f"{error.problem}: {error.hint}"
        # `train` and `eval` have these flags too.
        has_flag = any(f"--{flag}" in error.hint for flag in ("encoding", "field", "kind"))
        if has_flag or not error.can_skip:
            raise UserError(message) from None
        # Those that training sets, or it would refuse the shards; a Tokenizer has no name to give.
        by_name = str(request.split_by_name).lower()
        defaults = {**vars(TextFormat()), **vars(TextOptions()), "split_by_name": "true"}
        values = {**vars(request.text_format), **vars(request), "split_by_name": by_name}
        names = ["field", "encoding", "kind", "val_fraction", "split_by_name"]
        names += ["tokenizer"] if isinstance(request.tokenizer, str) else []
        names += ["vocab_size"] if request.tokenizer == "bpe" else []
        command = f"gptforge prepare {quote(request.names[0])} --out DIR --skip_bad true"
        flags = [f" --{n} {quote(str(values[n]))}" for n in names if values[n] != defaults[n]]
        hint = f"skip such input: `{command}{''.join(flags)}`, and give DIR instead"
        raise UserError(f"{message}, or {hint}") from None
    except RunError as error:
        where = "it is the cache of prepared data, which XDG_CACHE_HOME moves elsewhere"
        raise RunError(f"{error}; {where}") from None


def writable_cache() -> Path:
    """The folder of the cache, or a temporary one if the home is missing or read-only."""
    folder = files.cache_dir() / "data"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = files.private_temp_dir() / "data"
    folder.mkdir(exist_ok=True)
    return folder


def clear_cache() -> None:
    """Delete all prepared texts, except those that are being prepared."""
    for entry in writable_cache().iterdir():
        if entry.name.startswith(SPOOL_PREFIX):
            continue  # a process may be reading it; `_delete_unused` finds what is left behind
        if not entry.is_dir() or entry.is_symlink():
            files.remove(entry)
        elif lock := lock_folder(entry):
            with lock:
                for path in entry.iterdir():
                    if path.name != LOCK_FILE:
                        files.remove(path)
            with contextlib.suppress(OSError):  # another process prepares it by now
                entry.rmdir()


def _delete_unused(cache: Path, *, now: float) -> None:
    oldest = now - MAX_AGE_DAYS * 24 * 3600
    patterns = (f"*/{REQUEST_FILE}", f"{SPOOL_PREFIX}*", f"{BPE_PREFIX}*", f"{TEXT_PREFIX}*")
    for path in [path for pattern in patterns for path in cache.glob(pattern)]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                files.remove(path.parent if path.name == REQUEST_FILE else path)


def store_texts(texts: Texts, *, field: str) -> Path:
    """Write texts to a file of the cache that is named after its content, so that a run resumes.

    Args:
        texts: one text, or documents: strings, or rows with a column `field` such as those of a
            Hugging Face dataset. A generator is read once.
        field: the column, and the field of the JSON lines that hold the documents.

    Raises:
        UserError: for anything else, and if there is no text.
    """
    suffix, lines = "jsonl", _json_lines(texts, field)
    if isinstance(texts, str):
        suffix, lines = "txt", iter([texts])
        # Path.is_file raises an OSError for a text that is too long for a path.
        if "\n" not in texts and os.path.isfile(texts):  # noqa: PTH113
            raise UserError(f"text is the path of a file, {texts}: give it as input")
    cache, digest = writable_cache(), hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=cache) as folder:
        partial = Path(folder) / "text"
        with partial.open("wb") as file:
            for number, line in enumerate(lines):
                try:
                    data = line.encode()
                except UnicodeEncodeError as error:
                    raise UserError(f"text: document {number} is not valid text: {error}") from None
                digest.update(data)
                file.write(data)
            if not file.tell():
                raise UserError("text is empty: give a string or documents")
        path = cache / f"{TEXT_PREFIX}{digest.hexdigest()[:16]}.{suffix}"
        partial.replace(path)
    return path


def _json_lines(texts: Iterable[object], field: str) -> Iterator[str]:
    if isinstance(texts, bytes | os.PathLike) or not isinstance(texts, Iterable):
        raise UserError(f"text takes strings or a dataset, not {short_repr(texts)}")
    # Iterating over a DatasetDict or a DataFrame would give the names of its parts.
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):
        names = ", ".join(map(repr, texts))
        kind = type(texts).__name__
        raise UserError(f"text is a {kind} of {names}: give one of them, as text=data[NAME]")
    for number, row in enumerate(texts):
        if isinstance(row, Mapping) and field not in row:
            names = ", ".join(map(repr, row))
            raise UserError(f"text has no column {field!r}, but {names}: name one with field")
        text = row[field] if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise UserError(f"text: document {number} is {short_repr(text)}, not a string")
        yield json.dumps({field: text}, ensure_ascii=False) + "\n"
