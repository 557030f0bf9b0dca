"""A text that was prepared once is not prepared again: shards in the user's cache, by content."""

import hashlib
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gptforge import files
from gptforge.data.bad import RefusedError
from gptforge.data.documents import Form
from gptforge.data.index import Index
from gptforge.data.prepare import REQUEST, VERSION, prepare
from gptforge.data.request import Meter, Request
from gptforge.data.sources import find_sources
from gptforge.errors import RunError, UserError
from gptforge.hardware import cache_folder
from gptforge.tokenizers import Tokenizer

DAYS = 90
"""Days without use after which prepared data is thrown away: it can be made again."""


def prepare_once(
    name: str,
    *,
    tokenizer: str | Tokenizer,
    val_fraction: float,
    form: Form,
    say: Callable[[str], None],
    meter: Meter | None = None,
) -> Index:
    """Shards of a file, a folder or a pattern, made now or before; the same content, the same
    shards, wherever it lies and whatever it is called.

    Raises:
        UserError: if it cannot be read; the message says how `gptforge prepare` would read it.
        RunError: if the disk of the cache is full.
    """
    sources = find_sources([name])
    contents = [[s.kind, s.packing, files.sha256(s.path)] for s in sources]
    vocabulary = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
    if isinstance(vocabulary, str) and Path(vocabulary).is_file():
        vocabulary = files.sha256(Path(vocabulary))
    asked = [VERSION, contents, vocabulary, val_fraction, asdict(form)]
    identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    request = Request(
        (name,), tokenizer=tokenizer, val_fraction=val_fraction, form=form, identity=identity
    )
    cache = _writable_cache()
    folder = cache / identity[:24]
    try:
        index = prepare(folder, request, wait=True, meter=meter, say=say)
    except RefusedError as bad:
        if "--encoding" in bad.remedy:
            # Training has that flag itself.
            raise UserError(f"{bad.what}: {bad.remedy}") from None
        command = f"gptforge prepare {shlex.quote(name)} --out DIR"
        raise UserError(f"{bad}; `{command}` has these flags: name DIR instead then") from None
    except RunError as error:
        raise RunError(
            f"{error}; it is the cache of prepared data, which XDG_CACHE_HOME puts elsewhere"
        ) from None
    (folder / REQUEST).touch()
    _forget_unused(cache)
    return index


def _writable_cache() -> Path:
    own = cache_folder() / "data"
    try:
        own.mkdir(parents=True, exist_ok=True)
        if os.access(own, os.W_OK):
            return own
    except OSError:
        pass
    # A home that is not there, or not ours to write in.
    other = files.private_temporary() / "data"
    other.mkdir(exist_ok=True)
    return other


def _forget_unused(cache: Path) -> None:
    before = time.time() - DAYS * 24 * 3600
    for request in cache.glob(f"*/{REQUEST}"):
        try:
            if request.stat().st_mtime < before:
                files.remove(request.parent)
        except OSError:
            continue
