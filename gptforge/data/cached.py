"""A text that was prepared once is not prepared again: shards in the user's cache, by content."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gptforge import files
from gptforge.data.bad import RefusedError
from gptforge.data.documents import Form
from gptforge.data.index import Index
from gptforge.data.pipes import is_pipe
from gptforge.data.prepare import REQUEST, VERSION, prepare
from gptforge.data.request import Meter, Request
from gptforge.data.sources import find_sources
from gptforge.errors import RunError, UserError
from gptforge.hardware import cache_folder
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

DAYS = 90
"""Days without use after which prepared data is thrown away: it can be made again."""
SPOOL = ".pipe-"
"""How folders begin that hold what came out of a pipe, as long as it is prepared."""


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
    cache = _writable_cache()
    with tempfile.TemporaryDirectory(prefix=SPOOL, dir=cache) as place:
        spool_folder = Path(place) if is_pipe(Path(name)) else None
        sources = find_sources([name], spool_folder=spool_folder)
        contents = [[s.kind, s.packing, files.sha256(s.path)] for s in sources]
        vocabulary = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
        if isinstance(vocabulary, str) and Path(vocabulary).is_file():
            vocabulary = files.sha256(Path(vocabulary))
        asked = [VERSION, contents, vocabulary, val_fraction, asdict(form)]
        request = Request(
            (name,),
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            form=form,
            sources=sources,
            identity=hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        )
        folder = cache / request.identity[:24]
        index = _prepare(folder, request, say=say, meter=meter)
    (folder / REQUEST).touch()
    _forget_unused(cache)
    return index


def _prepare(
    folder: Path, request: Request, *, say: Callable[[str], None], meter: Meter | None
) -> Index:
    try:
        return prepare(folder, request, wait=True, meter=meter, say=say)
    except RefusedError as bad:
        if "--encoding" in bad.remedy:
            # Training has that flag itself.
            raise UserError(f"{bad.what}: {bad.remedy}") from None
        command = f"gptforge prepare {quote(request.names[0])} --out DIR"
        raise UserError(f"{bad}; `{command}` has these flags: name DIR instead then") from None
    except RunError as error:
        raise RunError(
            f"{error}; it is the cache of prepared data, which XDG_CACHE_HOME puts elsewhere"
        ) from None


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
    for left_over in cache.glob(f"{SPOOL}*"):
        with contextlib.suppress(OSError):
            if left_over.stat().st_mtime < before:
                files.remove(left_over)
