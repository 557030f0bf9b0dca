"""`gptforge prepare`: text of any kind and size into token shards."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptforge.cli.flags import parse_args
from gptforge.errors import Terminated, UserError
from gptforge.printable import safe_print
from gptforge.shell import program_name, quote

if TYPE_CHECKING:
    from gptforge.data.index import Index


@dataclass(frozen=True)
class PrepareArgs:
    """Turn texts into token shards, which `--input` takes."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SRC...")]
    """Files, folders and patterns: text, JSON lines, Parquet, and .gz, .zst or .xz of them; - reads
    standard input."""
    out: str
    """Folder of the shards."""
    tokenizer: str = "gpt2"
    """gpt2, char, byte, or the path of a tokenizer.json."""
    val_fraction: float = 0.1
    """Share held out to judge models by; 0: none."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """What the files hold; auto goes by their names."""
    split_by_name: bool = True
    """Hold out files whose names say val, valid, validation or dev, and leave out test, if others
    say train; false: take them like all others."""
    encoding: str = "utf-8"
    """Of text files and JSON lines, for instance latin-1."""
    split_on: str = ""
    """Cut text files into documents at this mark, for instance '<|endoftext|>'."""
    skip_bad: bool = False
    """Leave out what cannot be read, and count it, instead of stopping."""
    workers: int = 0
    """Processes; 0: one a core."""
    shard_mb: int = 64
    """Megabytes of the files that go into one shard, more or less."""
    raw_bin: bool = False
    """Write train.bin and val.bin without headers, as nanoGPT reads them."""
    restart: bool = False
    """Move aside what lies in the folder."""


def prepare(args: list[str]) -> int:
    """Parse, prepare, say what was made; returns the exit code."""
    asked = parse_args(PrepareArgs, args, "gptforge prepare")
    if not asked.sources:
        raise UserError("gptforge prepare: name at least one file, folder or pattern")
    if asked.workers < 0 or asked.shard_mb < 1:
        raise UserError("--workers must be 0 or more, --shard_mb 1 or more")
    from gptforge.data.prepare.pipeline import prepare as make
    from gptforge.data.prepare.request import PrepareRequest
    from gptforge.data.prepare.text_io import TextFormat
    from gptforge.report.progress import open_meter

    request = PrepareRequest(
        asked.sources,
        tokenizer=asked.tokenizer,
        val_fraction=asked.val_fraction,
        text_format=TextFormat(asked.field, asked.encoding, asked.split_on),
        kind=asked.kind,
        split_by_name=asked.split_by_name,
        shard_bytes=asked.shard_mb * 2**20,
        skip_bad=asked.skip_bad,
        raw_bin=asked.raw_bin,
    )
    try:
        with open_meter("preparing") as meter:
            index = make(
                Path(asked.out),
                request,
                num_workers=asked.workers,
                restart=asked.restart,
                log=meter.log,
                progress=meter,
            )
    except (KeyboardInterrupt, Terminated):
        again = ", without --overwrite," if asked.restart else ""
        print(f"note: the same command{again} goes on with what is finished", file=sys.stderr)
        raise
    safe_print(describe(index))
    safe_print(f"Train on it: {program_name()} --input {quote(asked.out)}")
    return 0


def describe(index: "Index") -> str:
    """What a prepared folder holds, in a line."""
    from gptforge.printable import pluralize

    sides = []
    for side, words in (("train", "to learn from"), ("val", "held out")):
        if tokens := index.total(side, "tokens"):
            documents = index.total(side, "documents")
            of = pluralize(documents, "document", "documents")
            sides.append(f"{tokens:,} tokens of {of} {words}")
    bytes_, tokens = (
        index.total("train", what) + index.total("val", what) for what in ("bytes", "tokens")
    )
    name = index.record["tokenizer"]["name"]
    return (
        f"{index.folder.as_posix()}: {'; '.join(sides)}; {bytes_:,} bytes of text, "
        f"{bytes_ / max(1, tokens):.2f} a {name} token"
    )
