"""`gptforge prepare`, `cache` and `tokenizer train`: texts into tokens."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.parsing import DatasetArgs, TextFileArgs, parse_args
from gptforge.errors import UserError, explain_interruption
from gptforge.files import atomic_write
from gptforge.printable import pluralize, print_stderr, safe_print
from gptforge.report.log_handler import log_to
from gptforge.shell import program_name, quote, same_command

if TYPE_CHECKING:
    from gptforge.data.shard_index import Index


Sources = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="SRC...", help_behavior_hint="(required)"),
]


@dataclass(frozen=True)
class PrepareArgs(DatasetArgs):
    """Turn texts into token shards, which `--input` takes."""

    sources: Sources
    """Files, folders and patterns: text, JSON lines, Parquet, and .gz, .zst or .xz of them; -:
    standard input."""
    out: str
    """Folder for the shards."""
    tokenizer: str = "gpt2"
    """gpt2, char, byte, bpe (learned from the training part), or the path of a tokenizer.json."""
    vocab_size: int = 0
    """Ids that --tokenizer bpe learns; 0: depends on the size of the text."""
    skip_bad: bool = False
    """Skip and count what is not text, and files that the system cannot read, instead of
    stopping."""
    workers: int = 0
    """Processes; 0: one per core."""
    shard_mb: int = 64
    """Approximate megabytes of input per shard."""
    restart: bool = False
    """Move an existing folder to a backup and start from scratch."""


@dataclass(frozen=True)
class CacheArgs:
    """Show where tokenized texts are cached, and how much disk they take."""

    clear: bool = False
    """Delete them; training prepares a text again when it needs it."""


@dataclass(frozen=True)
class TokenizerArgs(TextFileArgs):
    """Train a byte-level BPE tokenizer; --tokenizer and transformers read the file."""

    sources: Sources
    """Files, folders and patterns, as for `gptforge prepare`."""
    out: str
    """The tokenizer.json to write."""
    vocab_size: int = 8192
    """Number of ids: 256 bytes, the merges, and <|endoftext|>."""
    skip_bad: bool = False
    """Skip what is not text, and files that the system cannot read, instead of stopping."""
    overwrite: bool = False
    """Replace an existing file."""


def main(argv: list[str]) -> None:
    """Prepare and describe the result."""
    args = parse_args(PrepareArgs, argv, "gptforge prepare")
    if not args.sources:
        raise UserError("gptforge prepare: name at least one file, folder or pattern")
    if args.workers < 0 or args.shard_mb < 1:
        raise UserError("--workers must be 0 or more, --shard_mb 1 or more")
    if args.vocab_size and args.tokenizer != "bpe":
        raise UserError("--vocab_size is for --tokenizer bpe, which learns that many ids")
    from gptforge.data.prepare.pipeline import prepare
    from gptforge.data.prepare.request import PrepareRequest
    from gptforge.data.prepare.text_io import TextFormat
    from gptforge.report.console import ProgressMeter

    request = PrepareRequest(
        args.sources,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        val_fraction=args.val_fraction,
        text_format=TextFormat(args.field, args.encoding, args.split_on),
        kind=args.kind,
        split_by_name=args.split_by_name,
        shard_bytes=args.shard_mb * 2**20,
        skip_bad=args.skip_bad,
        raw_bin=args.raw_bin,
    )
    same = same_command(restart=args.restart)
    with (
        explain_interruption(lambda: f"{same} resumes with the finished parts"),
        ProgressMeter("preparing") as progress,
        log_to(progress.log),
    ):
        index = prepare(
            Path(args.out),
            request,
            num_workers=args.workers,
            restart=args.restart,
            progress=progress,
        )
    safe_print(describe(index))
    safe_print(f"Train on it: {program_name()} --input {quote(args.out)}")


def describe(index: "Index") -> str:
    """Summarize a prepared folder in one line."""
    splits = []
    for split, use in (("train", "to train on"), ("val", "held out")):
        if tokens := index.total(split, "tokens"):
            documents = pluralize(index.total(split, "documents"), "document")
            splits.append(f"{tokens:,} tokens of {documents} {use}")
    num_bytes, tokens = (
        sum(index.total(s, q) for s in ("train", "val")) for q in ("bytes", "tokens")
    )
    tokenizer = index.record["tokenizer"]["name"]
    return (
        f"{index.folder.as_posix()}: {'; '.join(splits)}; {num_bytes:,} bytes of text, "
        f"{num_bytes / max(1, tokens):.2f} per {tokenizer} token"
    )


def cache_main(argv: list[str]) -> None:
    """Print the folder and its size, after clearing it if requested."""
    args = parse_args(CacheArgs, argv, "gptforge cache")
    from gptforge.data.cache import clear_cache, writable_cache
    from gptforge.report.run_info import disk_bytes

    if args.clear:
        clear_cache()
    folder = writable_cache()
    entries = pluralize(len(list(folder.iterdir())), "entry", "entries")
    safe_print(f"{folder.as_posix()}: {entries}, {disk_bytes(folder) / 1e6:,.1f} MB")


def tokenizer_main(argv: list[str]) -> None:
    """Train the tokenizer and write it."""
    if argv[:1] != ["train"] and not {"-h", "--help"} & set(argv):
        raise UserError("gptforge tokenizer: the only subcommand is `tokenizer train SRC...`")
    args = parse_args(TokenizerArgs, argv[argv[:1] == ["train"] :], "gptforge tokenizer train")
    out = Path(args.out)
    if not args.sources:
        raise UserError("gptforge tokenizer train: name at least one file, folder or pattern")
    if out.exists() and (out.is_dir() or not args.overwrite):
        raise UserError(f"--out {out} exists: choose another name, or --overwrite true")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):  # before the training, which may take minutes
        raise UserError(
            f"--out {out}: {out.parent.as_posix()} cannot be written to: choose another"
        )
    from gptforge.convert.hf_tokenizer import tokenizer_json
    from gptforge.tokenizers import load
    from gptforge.tokenizers.hf_bpe import train_bpe

    trained = train_bpe(_iter_text(args), args.vocab_size)
    if trained.vocab_size < args.vocab_size:
        print_stderr(f"note: this text gave {trained.vocab_size} ids, not {args.vocab_size}")
    atomic_write(out, json.dumps(tokenizer_json(trained), ensure_ascii=False, indent=1) + "\n")
    assert load(out).to_json() == trained.to_json()
    path = out.as_posix()
    safe_print(f"{path}: {trained.vocab_size} ids. Use it with --tokenizer {quote(path)}")


def _iter_text(args: TokenizerArgs) -> Iterator[str]:
    from gptforge.data.input_errors import BadInputHandler
    from gptforge.data.prepare.scan import iter_text, no_text_message
    from gptforge.data.prepare.sources import open_sources
    from gptforge.data.prepare.text_io import TextFormat

    bad_input = BadInputHandler(args.skip_bad)
    text_format, is_empty = TextFormat(args.field, args.encoding), True
    notices: list[str] = []
    options = {"kind": args.kind, "skip_unreadable": args.skip_bad, "notices": notices}
    with open_sources(args.sources, **options) as sources:
        for notice in notices:
            print_stderr(f"note: {notice}")
        for source in sources:
            for text in iter_text(source, text_format, bad_input):
                is_empty = is_empty and not text.strip()
                yield text
    if is_empty:
        raise UserError(no_text_message(args.sources, bad_input))
