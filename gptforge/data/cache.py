"""A text that was prepared once is not prepared again: shards in the user's cache, by content."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from gptforge import files
from gptforge.data.index import Index
from gptforge.data.input_errors import BadInputError
from gptforge.data.prepare.pipeline import PREPARE_VERSION, REQUEST_FILE, prepare
from gptforge.data.prepare.request import PrepareRequest, ProgressBar, select_files
from gptforge.data.prepare.sources import FileKind, find_sources, is_pipe
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import RunError, UserError
from gptforge.files import cache_dir
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

CACHE_VERSION = 2
"""Raised when an index says more than before: what was cached without it is prepared again."""
MAX_AGE_DAYS = 90
"""Days without use after which prepared data is thrown away: it can be made again."""
SPOOL_PREFIX = ".pipe-"
"""How folders begin that hold what came out of a pipe, as long as it is prepared."""


def prepare_cached(
    name: str,
    *,
    tokenizer: str | Tokenizer,
    val_fraction: float,
    text_format: TextFormat,
    kind: FileKind | Literal["auto"] = "auto",
    split_by_name: bool = True,
    needs_val: bool = False,
    log: Callable[[str], None],
    progress: ProgressBar | None = None,
) -> tuple[Index, tuple[str, ...]]:
    """Shards of a file, a folder or a pattern, made now or before; the same content, the same
    shards, wherever it lies and whatever it is called. And what should be known of the choice of
    its files, in words.

    Raises:
        UserError: if it cannot be read; the message says how `gptforge prepare` would read it.
        RunError: if the disk of the cache is full.
    """
    cache = _writable_cache()
    with tempfile.TemporaryDirectory(prefix=SPOOL_PREFIX, dir=cache) as place:
        spool_folder = Path(place) if is_pipe(Path(name)) else None
        request = PrepareRequest(
            (name,),
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            text_format=text_format,
            kind=kind,
            split_by_name=split_by_name,
            needs_val=needs_val,
            sources=find_sources([name], kind=kind, spool_dir=spool_folder),
        )
        chosen = select_files(request)
        contents = [[s.kind, s.compression, files.sha256(s.path)] for s in chosen.sources]
        vocabulary = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
        if isinstance(vocabulary, str) and Path(vocabulary).is_file():
            vocabulary = files.sha256(Path(vocabulary))
        how = [CACHE_VERSION, val_fraction, split_by_name, *chosen.val_sources]
        asked = [PREPARE_VERSION, contents, vocabulary, how, asdict(text_format)]
        identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        request = replace(request, cache_key=identity)
        folder = cache / request.cache_key[:24]
        index = _prepare(folder, request, say=log, meter=progress)
    (folder / REQUEST_FILE).touch()
    _forget_unused(cache)
    return index, chosen.notices


def _prepare(
    folder: Path, request: PrepareRequest, *, say: Callable[[str], None], meter: ProgressBar | None
) -> Index:
    text_format = request.text_format
    try:
        return prepare(folder, request, wait=True, progress=meter, log=say)
    except BadInputError as bad:
        # Training and eval have these flags themselves.
        has_flag = any(f"--{flag}" in bad.hint for flag in ("encoding", "field", "kind"))
        if has_flag or not bad.can_skip:
            raise UserError(f"{bad.problem}: {bad.hint}") from None
        flags = {"field": text_format.field, "encoding": text_format.encoding, "kind": request.kind}
        usual = {"field": TextFormat.field, "encoding": TextFormat.encoding, "kind": "auto"}
        named = "".join(
            f" --{flag} {quote(value)}" for flag, value in flags.items() if value != usual[flag]
        )
        command = f"gptforge prepare {quote(request.names[0])} --out DIR --skip_bad true{named}"
        raise UserError(
            f"{bad.problem}: {bad.hint}, or leave such things out: `{command}`, and name DIR instead"
        ) from None
    except RunError as error:
        raise RunError(
            f"{error}; it is the cache of prepared data, which XDG_CACHE_HOME puts elsewhere"
        ) from None


def _writable_cache() -> Path:
    own = cache_dir() / "data"
    try:
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return own
    except OSError:
        pass
    # A home that is not there, or not ours to write in.
    other = files.private_temp_dir() / "data"
    other.mkdir(exist_ok=True)
    return other


def _forget_unused(cache: Path) -> None:
    before = time.time() - MAX_AGE_DAYS * 24 * 3600
    for request in cache.glob(f"*/{REQUEST_FILE}"):
        try:
            if request.stat().st_mtime < before:
                files.remove(request.parent)
        except OSError:
            continue
    for left_over in cache.glob(f"{SPOOL_PREFIX}*"):
        with contextlib.suppress(OSError):
            if left_over.stat().st_mtime < before:
                files.remove(left_over)
