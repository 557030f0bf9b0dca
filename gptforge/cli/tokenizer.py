"""`gptforge tokenizer train`: a vocabulary learned from the user's own text."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptforge.cli.flags import parse_args
from gptforge.errors import UserError
from gptforge.files import atomic_write
from gptforge.printable import safe_print
from gptforge.shell import quote


@dataclass(frozen=True)
class TrainArgs:
    """Learn a byte-level BPE from texts; transformers reads the file, and so does --tokenizer."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC...")]
    """Files, folders and patterns, as `gptforge prepare` takes them."""
    out: str
    """The tokenizer.json to write."""
    vocab_size: int = 8192
    """Ids, all told: 256 bytes, merges, and the mark between documents."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """What the files hold; auto goes by their names."""
    encoding: str = "utf-8"
    """Of text files and JSON lines, for instance latin-1."""
    skip_bad: bool = False
    """Leave out what cannot be read instead of stopping."""
    overwrite: bool = False
    """Replace the file, if it is there."""


def tokenizer(args: list[str]) -> int:
    """Parse, learn, write; returns the exit code."""
    if args[:1] != ["train"] and not {"-h", "--help"} & set(args):
        raise UserError("gptforge tokenizer: the one thing it can do is `tokenizer train SRC...`")
    asked = parse_args(TrainArgs, args[args[:1] == ["train"] :], "gptforge tokenizer train")
    out = Path(asked.out)
    if not asked.sources:
        raise UserError("gptforge tokenizer train: name at least one file, folder or pattern")
    if out.exists() and (out.is_dir() or not asked.overwrite):
        raise UserError(f"--out {out} is there already: choose another name, or --overwrite true")
    from gptforge.convert.hf_tokenizer import tokenizer_json
    from gptforge.tokenizers import load
    from gptforge.tokenizers.train_bpe import train_bpe

    made = train_bpe(_texts(asked), asked.vocab_size)
    if made.vocab_size < asked.vocab_size:
        print(
            f"note: this text gave {made.vocab_size} ids, not {asked.vocab_size}", file=sys.stderr
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, json.dumps(tokenizer_json(made), ensure_ascii=False, indent=1) + "\n")
    assert load(out).to_json() == made.to_json()
    where = out.as_posix()
    safe_print(f"{where}: {made.vocab_size} ids. Use it with --tokenizer {quote(where)}")
    return 0


def _texts(asked: TrainArgs) -> Iterator[str]:
    from gptforge.data.input_errors import BadInput, BadInputHandler
    from gptforge.data.prepare.scan import iter_text, no_text_message
    from gptforge.data.prepare.sources import open_sources
    from gptforge.data.prepare.text_io import TextFormat

    skipped = BadInputHandler(asked.skip_bad)
    is_empty = True
    with open_sources(asked.sources, kind=asked.kind) as sources:
        for source in sources:
            try:
                for text in iter_text(source, TextFormat(asked.field, asked.encoding), skipped):
                    is_empty = is_empty and not text.strip()
                    yield text
            except BadInput as bad:
                skipped.handle(bad)
    if is_empty:
        raise UserError(no_text_message(asked.sources, skipped))
