"""Configurations as TOML files: the user's, and those of runs."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from gptforge.config import (
    FIELDS,
    FLAG_ONLY,
    METADATA_TABLE,
    REMOVED_FIELDS,
    RENAMED_FIELDS,
    Config,
    Value,
)
from gptforge.errors import UserError, parsing
from gptforge.files import read_text


def read_toml(path: Path, *, flag: str = "") -> tuple[dict[str, object], dict[str, str] | None]:
    """Read the fields that a TOML file sets; errors name the `flag` that it was given with.

    Returns:
        The fields, and the metadata of `to_toml` if a run wrote the file: then no field counts as
        set by the user. None if a user wrote it.
    """
    source = f"{flag} {path}".strip()
    with parsing(source, "a readable TOML file"):
        values = tomllib.loads(read_text(path))
    table = values.pop(METADATA_TABLE, None)
    made_by = {str(k): str(v) for k, v in table.items()} if isinstance(table, dict) else None
    for old, name in RENAMED_FIELDS.items():
        if old in values and name not in values:
            values[name] = values.pop(old)
    if made_by is not None:
        values = {name: value for name, value in values.items() if name not in REMOVED_FIELDS}
        if "split_by_name" not in values:
            # Version 0.1 read CSV as plain text and ignored splits in file names.
            is_table = Path(str(values.get("input"))).suffix.lower() in (".csv", ".tsv")
            values |= {"split_by_name": False, "kind": "text" if is_table else "auto"}
        # Runs from before this field make all their steps.
        values.setdefault("patience", 0)
    for name in sorted(FLAG_ONLY & values.keys()):
        if values.pop(name):
            raise UserError(f"{source}: {name} can only be set by a flag")
    return values, made_by


def run_file_values(config: Config) -> Mapping[str, object]:
    """The values of `--config`, which are all fields, if a run wrote the file; else none."""
    values, made_by = read_toml(Path(config.config)) if config.config else ({}, None)
    return {} if made_by is None else values


def to_toml(config: Config, metadata: Mapping[str, str]) -> str:
    """All fields as TOML, with `metadata` (versions, command) in a table of their own."""
    names = [name for name in FIELDS if name not in FLAG_ONLY]
    lines = [f"{name} = {_toml_value(getattr(config, name))}" for name in names]
    lines += ["", f"[{METADATA_TABLE}]"]
    lines += [f"{name} = {_toml_value(text)}" for name, text in metadata.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON strings are TOML basic strings, except that TOML wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
