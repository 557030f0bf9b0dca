"""Prepare a text only once: shards in the user's cache, by content."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from gptforge import files, tokenizers
from gptforge.data.input_errors import BadInputError
from gptforge.data.prepare.learn_bpe import learn_bpe
from gptforge.data.prepare.pipeline import PREPARE_VERSION, REQUEST_FILE, prepare
from gptforge.data.prepare.request import (
    FileSelection,
    PrepareRequest,
    ProgressBar,
    select_files,
)
from gptforge.data.prepare.scan import scan
from gptforge.data.prepare.sources import FileKind, find_sources, is_pipe
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import Index
from gptforge.errors import RunError, UserError
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

CACHE_VERSION = 2  # raise it when the index says more: older entries are prepared again
MAX_AGE_DAYS = 90  # unused data is deleted after that: it can be prepared again
BPE_PREFIX = "bpe-"  # of the tokenizers that were learned from texts
SPOOL_PREFIX = ".pipe-"  # of folders for the content of pipes


def prepare_cached(
    name: str,
    *,
    tokenizer: str | Tokenizer,
    vocab_size: int = 0,
    val_fraction: float,
    text_format: TextFormat,
    kind: FileKind | Literal["auto"] = "auto",
    split_by_name: bool = True,
    needs_val: bool = False,
    progress: ProgressBar | None = None,
) -> tuple[Index, tuple[str, ...]]:
    """Prepare a file, a folder or a pattern, or find its shards in the cache.

    The same content has the same shards, whatever its path.

    Returns:
        The index, and what the user should know about the choice of files.

    Raises:
        UserError: if it cannot be read; the message says how `gptforge prepare` would read it.
        RunError: if the disk of the cache is full.
    """
    cache = _writable_cache()
    with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=cache) as spool:
        spool_dir = Path(spool) if is_pipe(Path(name)) else None
        request = PrepareRequest(
            (name,),
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            val_fraction=val_fraction,
            text_format=text_format,
            kind=kind,
            split_by_name=split_by_name,
            needs_val=needs_val,
            sources=find_sources([name], kind=kind, spool_dir=spool_dir),
        )
        selection = select_files(request)
        contents = [[s.kind, s.compression, files.sha256(s.path)] for s in selection.sources]
        options = [CACHE_VERSION, val_fraction, split_by_name, *selection.val_sources]

        def key_of(vocab: object) -> str:
            record = [PREPARE_VERSION, contents, vocab, options, asdict(text_format)]
            return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

        with _hints_for(request):
            if tokenizer == "bpe":
                # The shards depend on the merges alone: a resumed run, which has them, finds them.
                learned = cache / f"{BPE_PREFIX}{key_of(['bpe', vocab_size])[:24]}.json"
                tokenizer = _learn_bpe(learned, request, selection)
            vocab = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
            if isinstance(vocab, str) and Path(vocab).is_file():
                vocab = files.sha256(Path(vocab))
            cache_key = key_of(vocab)
            folder = cache / cache_key[:24]
            request = replace(request, tokenizer=tokenizer, cache_key=cache_key)
            index = prepare(folder, request, wait=True, progress=progress)
    (folder / REQUEST_FILE).touch()
    _delete_unused(cache)
    return index, selection.notices


def _learn_bpe(path: Path, request: PrepareRequest, selection: FileSelection) -> Tokenizer:
    """The tokenizer in this file of the cache; learn and write it if the file is missing."""
    with contextlib.suppress(OSError, UserError):
        tokenizer = tokenizers.load(path)
        path.touch()
        return tokenizer
    sources = selection.sources
    try:
        scanned = scan(
            sources,
            request.text_format,
            request.val_fraction,
            skip_bad=request.skip_bad,
            val_sources=selection.val_sources,
            split_duplicates=not request.split_by_name,
        )
        tokenizer = learn_bpe(request, sources, scanned.split_rule)
    except BadInputError as error:
        # Skipping the only file would leave nothing.
        is_only_file = len(sources) == 1 and error.problem.startswith(f"{sources[0].name}: ")
        raise BadInputError(error.problem, error.hint, can_skip=not is_only_file) from None
    tokenizers.save(tokenizer, path)
    return tokenizer


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
        text_format = request.text_format
        flags = [
            ("field", text_format.field, TextFormat.field),
            ("encoding", text_format.encoding, TextFormat.encoding),
            ("kind", request.kind, "auto"),
        ]
        command = f"gptforge prepare {quote(request.names[0])} --out DIR --skip_bad true"
        command += "".join(
            f" --{f} {quote(value)}" for f, value, default in flags if value != default
        )
        raise UserError(
            f"{message}, or skip such input: `{command}`, and give --input DIR instead"
        ) from None
    except RunError as error:
        raise RunError(
            f"{error}; it is the cache of prepared data, which XDG_CACHE_HOME moves elsewhere"
        ) from None


def _writable_cache() -> Path:
    folder = files.cache_dir() / "data"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    # The home is missing or read-only.
    folder = files.private_temp_dir() / "data"
    folder.mkdir(exist_ok=True)
    return folder


def _delete_unused(cache: Path) -> None:
    oldest = time.time() - MAX_AGE_DAYS * 24 * 3600
    requests = list(cache.glob(f"*/{REQUEST_FILE}"))
    others = [path for prefix in (SPOOL_PREFIX, BPE_PREFIX) for path in cache.glob(f"{prefix}*")]
    for path in [*requests, *others]:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                files.remove(path.parent if path.name == REQUEST_FILE else path)
