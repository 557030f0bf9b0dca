"""`gptforge doctor [PATH]`: check this machine or a dataset for problems."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptforge.cli.parsing import DatasetArgs, parse_args
from gptforge.config import merge
from gptforge.errors import UserError
from gptforge.findings import Finding
from gptforge.presets import AUTO, get_preset
from gptforge.printable import printable
from gptforge.recipe import make_recipe


@dataclass(frozen=True)
class DoctorArgs(DatasetArgs):
    """Check this machine, or all of a dataset: texts or token shards."""

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PATH]")] = ""
    """File or folder; empty: the machine."""
    preset: str = "gpt2"
    """Preset whose tokenizer and context_length a text is checked for."""
    tokenizer: str = ""
    """gpt2, char, byte, bpe, or a tokenizer.json; empty: the preset's, or the shards' own."""
    context_length: int = 0
    """Tokens in a training sequence; 0: as in the preset."""
    json: bool = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Check and print the findings; returns 1 if there is an error among them."""
    args = parse_args(DoctorArgs, argv, "gptforge doctor")
    if args.context_length < 0 or not 0 <= args.val_fraction < 1:
        raise UserError("--context_length must be 0 or more, --val_fraction from 0 to below 1")
    if args.path:
        findings = _check_data(args)
    else:
        from gptforge.doctor.machine import check_machine

        findings = check_machine()
    is_ok = all(finding.level != "error" for finding in findings)
    if args.json:
        print(json.dumps({"ok": is_ok, "findings": [dataclasses.asdict(f) for f in findings]}))
    else:
        for finding in findings:
            print(f"{finding.level:<7} {printable(finding)}")
    return 0 if is_ok else 1


def _check_data(args: DoctorArgs) -> list[Finding]:
    from gptforge.data.dataset import DatasetOptions
    from gptforge.data.prepare.request import estimate_text_size, find_shards
    from gptforge.data.prepare.text_io import TextFormat
    from gptforge.data.shard_index import INDEX_FILE
    from gptforge.doctor.shards import check_shards
    from gptforge.doctor.texts import check_texts

    path, preset = Path(args.path), get_preset(args.preset)
    options = DatasetOptions(
        tokenizer=args.tokenizer,
        val_fraction=args.val_fraction,
        text_format=TextFormat(args.field, args.encoding, args.split_on),
        kind=args.kind,
        split_by_name=args.split_by_name,
        raw_bin=args.raw_bin,
        require_tokenizer=bool(args.tokenizer),
    )
    if args.preset == AUTO:
        size = estimate_text_size(path, options)
        preset = merge(preset, make_recipe(size.num_bytes, "gpu").values, source="preset auto")
    options = dataclasses.replace(options, tokenizer=args.tokenizer or preset.tokenizer)
    is_prepared = (path / INDEX_FILE).is_file() or find_shards(path)
    check = check_shards if is_prepared else check_texts
    return check(path, options, context_length=args.context_length or preset.context_length)
