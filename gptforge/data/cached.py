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
from gptforge.data.bad import RefusedError
from gptforge.data.chosen import choose
from gptforge.data.documents import Form
from gptforge.data.index import Index
from gptforge.data.pipes import is_pipe
from gptforge.data.prepare import REQUEST, VERSION, prepare
from gptforge.data.request import Meter, Request
from gptforge.data.sources import Kind, find_sources
from gptforge.errors import RunError, UserError
from gptforge.hardware import cache_folder
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

FORMAT = 2
"""Raised when an index says more than before: what was cached without it is prepared again."""
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
    kind: Kind | Literal["auto"] = "auto",
    split_by_name: bool = True,
    is_to_judge: bool = False,
    say: Callable[[str], None],
    meter: Meter | None = None,
) -> tuple[Index, tuple[str, ...]]:
    """Shards of a file, a folder or a pattern, made now or before; the same content, the same
    shards, wherever it lies and whatever it is called. And what should be known of the choice of
    its files, in words.

    Raises:
        UserError: if it cannot be read; the message says how `gptforge prepare` would read it.
        RunError: if the disk of the cache is full.
    """
    cache = _writable_cache()
    with tempfile.TemporaryDirectory(prefix=SPOOL, dir=cache) as place:
        spool_folder = Path(place) if is_pipe(Path(name)) else None
        request = Request(
            (name,),
            tokenizer=tokenizer,
            val_fraction=val_fraction,
            form=form,
            kind=kind,
            split_by_name=split_by_name,
            is_to_judge=is_to_judge,
            sources=find_sources([name], kind=kind, spool_folder=spool_folder),
        )
        chosen = choose(request)
        contents = [[s.kind, s.packing, files.sha256(s.path)] for s in chosen.sources]
        vocabulary = tokenizer if isinstance(tokenizer, str) else tokenizer.to_json()
        if isinstance(vocabulary, str) and Path(vocabulary).is_file():
            vocabulary = files.sha256(Path(vocabulary))
        how = [FORMAT, val_fraction, split_by_name, *chosen.held_out]
        asked = [VERSION, contents, vocabulary, how, asdict(form)]
        identity = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        request = replace(request, identity=identity)
        folder = cache / request.identity[:24]
        index = _prepare(folder, request, say=say, meter=meter)
    (folder / REQUEST).touch()
    _forget_unused(cache)
    return index, chosen.notices


def _prepare(
    folder: Path, request: Request, *, say: Callable[[str], None], meter: Meter | None
) -> Index:
    form = request.form
    try:
        return prepare(folder, request, wait=True, meter=meter, say=say)
    except RefusedError as bad:
        # Training and eval have these flags themselves.
        has_flag = any(f"--{flag}" in bad.remedy for flag in ("encoding", "field", "kind"))
        if has_flag or not bad.leaves_some:
            raise UserError(f"{bad.what}: {bad.remedy}") from None
        flags = {"field": form.field, "encoding": form.encoding, "kind": request.kind}
        usual = {"field": Form.field, "encoding": Form.encoding, "kind": "auto"}
        named = "".join(
            f" --{flag} {quote(value)}" for flag, value in flags.items() if value != usual[flag]
        )
        command = f"gptforge prepare {quote(request.names[0])} --out DIR --skip_bad true{named}"
        raise UserError(
            f"{bad.what}: {bad.remedy}, or leave such things out: `{command}`, and name DIR instead"
        ) from None
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
