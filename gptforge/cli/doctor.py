"""`gptforge doctor [PATH]`: what this machine can do, what is wrong with this data."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptforge.cli.flags import parse_args
from gptforge.errors import UserError
from gptforge.presets import get_preset
from gptforge.printable import printable

if TYPE_CHECKING:
    from gptforge.data.checks import Finding


SIGNS = {"good": "ok     ", "warning": "warning", "error": "error  "}


@dataclass(frozen=True)
class DoctorArgs:
    """Look at this machine, or at data: texts, or token shards, to their end."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PATH]")] = ""
    """File or folder; empty: the machine."""
    preset: str = "gpt2"
    """Whose tokenizer and windows to judge a text by."""
    tokenizer: str = ""
    """gpt2, char, byte, or a tokenizer.json; empty: the preset's, or what shards bring along."""
    val_fraction: float = 0.1
    """Share that a run would hold out."""
    context_length: int = 0
    """Tokens in a window; 0: as many as the preset's."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    encoding: str = "utf-8"
    """Of text files and JSON lines."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """What the files hold; auto goes by their names."""
    split_by_name: bool = True
    """Hold out files whose names say val, valid, validation or dev, and leave out test, if others
    say train."""
    split_on: str = ""
    """What stands between the documents of a text file."""
    raw_bin: bool = False
    """Take .bin files for bare uint16 ids, as nanoGPT writes them."""
    json: bool = False
    """Print one JSON object."""


def doctor(args: list[str]) -> int:
    """Parse, look, print; 1 if there is an error among what was found."""
    asked = parse_args(DoctorArgs, args, "gptforge doctor")
    if asked.context_length < 0 or not 0 <= asked.val_fraction < 1:
        raise UserError("--context_length must be 0 or more, --val_fraction from 0 to below 1")
    usual = get_preset(asked.preset)
    asked = dataclasses.replace(asked, context_length=asked.context_length or usual.context_length)
    found = _data(asked) if asked.path else _machine()
    is_well = all(finding.level != "error" for finding in found)
    if asked.json:
        print(json.dumps({"ok": is_well, "findings": [dataclasses.asdict(f) for f in found]}))
    else:
        for finding in found:
            print(f"{SIGNS[finding.level]} {printable(finding)}")
    return 0 if is_well else 1


def _machine() -> "list[Finding]":
    from gptforge.doctor.machine import check_machine

    return check_machine()


def _data(asked: DoctorArgs) -> "list[Finding]":
    from gptforge.data.dataset import SHARD_SUFFIX, DatasetOptions
    from gptforge.data.index import INDEX_FILE
    from gptforge.data.prepare.text_io import TextFormat
    from gptforge.doctor.shards import check_shards
    from gptforge.doctor.texts import check_texts

    path = Path(asked.path)
    is_shards = (
        path.suffix == SHARD_SUFFIX
        or (path / INDEX_FILE).is_file()
        or any(path.glob(f"*{SHARD_SUFFIX}"))
    )
    form = TextFormat(asked.field, asked.encoding, asked.split_on)
    if is_shards:
        wanted = DatasetOptions(
            tokenizer=asked.tokenizer or "gpt2",
            val_fraction=asked.val_fraction,
            raw_bin=asked.raw_bin,
            require_tokenizer=bool(asked.tokenizer),
        )
        return check_shards(path, wanted, context_length=asked.context_length)
    return check_texts(
        path,
        tokenizer=asked.tokenizer or get_preset(asked.preset).tokenizer,
        val_fraction=asked.val_fraction,
        context_length=asked.context_length,
        text_format=form,
        kind=asked.kind,
        split_by_name=asked.split_by_name,
    )
