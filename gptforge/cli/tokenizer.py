"""`gptforge tokenizer train`: a BPE tokenizer trained on the user's own text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptforge.cli.parsing import TextFileArgs, parse_args
from gptforge.errors import UserError
from gptforge.files import atomic_write
from gptforge.printable import print_stderr, safe_print
from gptforge.shell import quote


@dataclass(frozen=True)
class TrainArgs(TextFileArgs):
    """Train a byte-level BPE tokenizer; --tokenizer and transformers read the file."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC...")]
    """Files, folders and patterns, as for `gptforge prepare`."""
    out: str
    """The tokenizer.json to write."""
    vocab_size: int = 8192
    """Number of ids: 256 bytes, the merges, and <|endoftext|>."""
    skip_bad: bool = False
    """Skip what cannot be read instead of stopping."""
    overwrite: bool = False
    """Replace an existing file."""


def main(argv: list[str]) -> int:
    """Train the tokenizer and write it; returns the exit code."""
    if argv[:1] != ["train"] and not {"-h", "--help"} & set(argv):
        raise UserError("gptforge tokenizer: the only subcommand is `tokenizer train SRC...`")
    args = parse_args(TrainArgs, argv[argv[:1] == ["train"] :], "gptforge tokenizer train")
    out = Path(args.out)
    if not args.sources:
        raise UserError("gptforge tokenizer train: name at least one file, folder or pattern")
    if out.exists() and (out.is_dir() or not args.overwrite):
        raise UserError(f"--out {out} exists: choose another name, or --overwrite true")
    from gptforge.convert.hf_tokenizer import tokenizer_json
    from gptforge.tokenizers import load
    from gptforge.tokenizers.train_bpe import train_bpe

    trained = train_bpe(_iter_text(args), args.vocab_size)
    if trained.vocab_size < args.vocab_size:
        print_stderr(f"note: this text gave {trained.vocab_size} ids, not {args.vocab_size}")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, json.dumps(tokenizer_json(trained), ensure_ascii=False, indent=1) + "\n")
    assert load(out).to_json() == trained.to_json()
    path = out.as_posix()
    safe_print(f"{path}: {trained.vocab_size} ids. Use it with --tokenizer {quote(path)}")
    return 0


def _iter_text(args: TrainArgs) -> Iterator[str]:
    from gptforge.data.input_errors import BadInputHandler
    from gptforge.data.prepare.scan import iter_text, no_text_message
    from gptforge.data.prepare.sources import open_sources
    from gptforge.data.prepare.text_io import TextFormat

    bad_input = BadInputHandler(args.skip_bad)
    text_format, is_empty = TextFormat(args.field, args.encoding), True
    with open_sources(args.sources, kind=args.kind) as sources:
        for source in sources:
            for text in iter_text(source, text_format, bad_input):
                is_empty = is_empty and not text.strip()
                yield text
    if is_empty:
        raise UserError(no_text_message(args.sources, bad_input))
