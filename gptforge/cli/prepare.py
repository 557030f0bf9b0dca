"""`gptforge prepare`: texts of any kind and size into token shards."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from gptforge.cli.parsing import DatasetArgs, parse_args
from gptforge.errors import Terminated, UserError
from gptforge.printable import pluralize, safe_print
from gptforge.report.log_handler import log_to
from gptforge.shell import program_name, quote

if TYPE_CHECKING:
    from gptforge.data.shard_index import Index


@dataclass(frozen=True)
class PrepareArgs(DatasetArgs):
    """Turn texts into token shards, which `--input` takes."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC...")]
    """Files, folders and patterns: text, JSON lines, Parquet, and .gz, .zst or .xz of them; -:
    standard input."""
    out: str
    """Folder for the shards."""
    tokenizer: str = "gpt2"
    """gpt2, char, byte, bpe (learned from the training part), or the path of a tokenizer.json."""
    vocab_size: int = 0
    """Ids that --tokenizer bpe learns; 0: by the size of the text."""
    skip_bad: bool = False
    """Skip what cannot be read, and count it, instead of stopping."""
    workers: int = 0
    """Processes; 0: one per core."""
    shard_mb: int = 64
    """Approximate megabytes of input per shard."""
    restart: bool = False
    """Move an existing folder aside and start from scratch."""


def main(argv: list[str]) -> int:
    """Prepare and describe the result; returns the exit code."""
    args = parse_args(PrepareArgs, argv, "gptforge prepare")
    if not args.sources:
        raise UserError("gptforge prepare: name at least one file, folder or pattern")
    if args.workers < 0 or args.shard_mb < 1:
        raise UserError("--workers must be 0 or more, --shard_mb 1 or more")
    from gptforge.data.prepare.pipeline import prepare
    from gptforge.data.prepare.request import PrepareRequest
    from gptforge.data.prepare.text_io import TextFormat
    from gptforge.report.progress import ProgressMeter

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
    try:
        with ProgressMeter("preparing") as progress, log_to(progress.log):
            index = prepare(
                Path(args.out),
                request,
                num_workers=args.workers,
                restart=args.restart,
                progress=progress,
            )
    except (KeyboardInterrupt, Terminated):
        command = "the same command without --restart" if args.restart else "the same command"
        print(f"note: {command} resumes with the finished parts", file=sys.stderr)
        raise
    safe_print(describe(index))
    safe_print(f"Train on it: {program_name()} --input {quote(args.out)}")
    return 0


def describe(index: "Index") -> str:
    """Summarize a prepared folder in one line."""
    splits = []
    for split, use in (("train", "to train on"), ("val", "held out")):
        if tokens := index.total(split, "tokens"):
            documents = pluralize(index.total(split, "documents"), "document", "documents")
            splits.append(f"{tokens:,} tokens of {documents} {use}")
    num_bytes, tokens = (
        sum(index.total(s, q) for s in ("train", "val")) for q in ("bytes", "tokens")
    )
    tokenizer = index.record["tokenizer"]["name"]
    return (
        f"{index.folder.as_posix()}: {'; '.join(splits)}; {num_bytes:,} bytes of text, "
        f"{num_bytes / max(1, tokens):.2f} per {tokenizer} token"
    )
