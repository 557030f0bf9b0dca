"""Command line flags: parsing, spelling, precedence, and errors in one line."""

import contextlib
import difflib
import io
import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import docstring_parser
import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from gptforge.config import FIELDS, FOREIGN_FIELDS, RENAMED_FIELDS, Config, merge
from gptforge.config_file import read_toml, run_file_values
from gptforge.errors import UserError, runs_hint
from gptforge.presets import AUTO, PRESETS, get_preset
from gptforge.shell import program_name

logger = logging.getLogger(__name__)

T = TypeVar("T")
C = TypeVar("C", bound=Config)
BOOLEANS = {"true": True, "false": False}
RENAMED_FLAGS = RENAMED_FIELDS | {"turns": "repeats"}
"""Old spelling -> flag. Aliases are accepted but not shown by `--help`."""
FOREIGN_FLAGS = FOREIGN_FIELDS | {
    "input": "data",
    "max_tokens": "max_new_tokens",
    "length": "max_new_tokens",
    "n": "num_samples",
}
"""Flags of other commands and programs -> the flag to suggest, where a command has it."""
MIN_COLUMNS = 20  # tyro breaks lines forever below 8
NUMBER_ERRORS = {
    "invalid literal for int() with base 10:": "must be a whole number, not",
    "could not convert string to float:": "must be a number, not",
}


@dataclass(frozen=True, kw_only=True)
class TextFileArgs:
    """Flags of commands that read text files."""

    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """Format of the files; auto: by their names."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet or CSV file, that holds the text."""
    encoding: str = "utf-8"
    """Encoding of text files and JSON lines, for instance latin-1."""


@dataclass(frozen=True, kw_only=True)
class DatasetArgs(TextFileArgs):
    """Flags of commands that split text files into documents, and documents into train and val."""

    val_fraction: float = 0.1
    """Fraction of the text held out for validation; 0: none."""
    split_by_name: bool = True
    """If a file name contains the word train, hold out files with val, valid, validation or dev in
    their names, and skip those with test; false: treat all files alike."""
    split_on: str = ""
    """Cut text files into documents at this separator, for instance '<|endoftext|>'."""
    raw_bin: bool = False
    """Read and write .bin files as raw uint16 ids without a header, as nanoGPT does."""


def parse_train_args(
    args: Sequence[str],
    *,
    cls: type[C] = Config,  # type: ignore[assignment]
    prog: str = "gptforge",
    epilog: str = "",
) -> tuple[C, frozenset[str]]:
    """Build a training configuration: defaults < preset < file < flags.

    Args:
        args: arguments after the command's name.
        cls: the configuration, perhaps a subclass with further flags.
        prog: name of the command in its help and errors; "gptforge" becomes how it was started.
        epilog: end of the help text.

    Returns:
        The configuration, with an empty `preset` if none was named, and the fields set explicitly,
        by flags or in the file.
    """
    flags = flag_values(normalize_flags(cls, args))
    base, from_file = preset_and_file(flags.get("preset", ""), flags.get("config", ""))
    description = f"{(cls.__doc__ or '').strip()} Presets: {', '.join(PRESETS)}.{epilog}"
    parsed = parse_args(cls, args, prog, default=cls(**vars(base)), description=description)
    return parsed, frozenset(flags) | from_file


def preset_and_file(preset: str, file: str) -> tuple[Config, frozenset[str]]:
    """The configuration that flags override, and the fields that the TOML file sets explicitly.

    Args:
        preset: value of `--preset`; empty: that of the file.
        file: value of `--config`, or empty.
    """
    values, made_by = read_toml(Path(file), flag="--config") if file else ({}, None)
    name = preset or values.get("preset")
    base = get_preset(str(name)) if name else Config()
    explicit = frozenset(values) if made_by is None else frozenset()
    return merge(base, values, source=f"--config {file}"), explicit


def resolve_preset(config: Config, explicit: frozenset[str]) -> Config:
    """Choose a preset if none was named, and shorten a default warmup that exceeds max_steps.

    Args:
        config: as `parse_train_args` returns it; fields of subclasses are dropped.
        explicit: fields set by flags or in the file; they override the preset.
    """
    config = Config(**{name: getattr(config, name) for name in FIELDS})
    if config.mlp_matmul == "quack":
        logger.info(
            "note: --mlp_matmul quack has no effect: support for the quack package was removed"
        )
    if config.preset:
        logger.info(f"preset: {config.preset} ({PRESETS[config.preset].description})")
    elif not run_file_values(config):  # the file of a teacher names no preset
        import torch

        has_cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
        has_cuda |= config.device.startswith("cuda:")
        name, reason = "shakespeare-cpu", "no CUDA GPU is used"
        if has_cuda:
            name, reason = "gpt2", "there is a CUDA GPU"
            if _fits_auto(config):
                name, reason = AUTO, "there is a CUDA GPU, and the text is your own"
        logger.info(
            f"preset: {name} ({PRESETS[name].description}), because {reason}; choose with "
            f"--preset: {', '.join(PRESETS)}"
        )
        overrides = {field: getattr(config, field) for field in explicit}
        config = merge(get_preset(name), overrides | {"preset": name}, source="flags")
    if "warmup_steps" not in explicit and config.warmup_steps > config.max_steps >= 1:
        shorter = max(1, config.max_steps // 10)
        config = merge(config, {"warmup_steps": shorter}, source="flags")
    return config


def _fits_auto(config: Config) -> bool:
    """Whether `--input` names files of the user, whose size fits a configuration; a pipe has none.

    But not for a run of the text in the run folder that version 0.2 began, with gpt2 for all texts.
    """
    from gptforge.checkpoint.run_dir import is_run_of
    from gptforge.data.dataset import BUNDLED_INPUT
    from gptforge.data.prepare.sources import is_pipe

    if config.input in ("", BUNDLED_INPUT) or config.init_from or is_pipe(Path(config.input)):
        return False
    folder = Path(config.out_dir or "runs/gpt2")
    return config.restart or not is_run_of(folder, "gpt2", config.input)


def flag_values(args: Sequence[str], names: Collection[str] = FIELDS) -> dict[str, str]:
    """Find flags in `args`, by default of `Config`: names with underscores -> their values."""
    found = {}
    for arg, following in zip_longest(args, args[1:], fillvalue=""):
        name, equals, value = _split(arg)
        if name in names:
            found[name] = value if equals else following
    return found


def _split(arg: str) -> tuple[str, str, str]:
    """`--max-lr=1e-3` as `max_lr`, `=` and `1e-3`; no name if it is not a flag."""
    flag, equals, value = arg.partition("=")
    name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
    return name, equals, value


def parse_args(
    cls: type[T], args: Sequence[str], prog: str, *, default: Any = None, description: str = ""
) -> T:
    """Parse flags into a dataclass with tyro.

    Raises:
        UserError: for any mistake, in one line instead of tyro's box.
    """
    prog = prog.replace("gptforge", program_name(), 1)
    args = normalize_flags(cls, args)
    shown = cls
    if not {"-h", "--help"}.isdisjoint(args):
        shown = _with_help(cls)
        if shutil.get_terminal_size().columns < MIN_COLUMNS:
            os.environ["COLUMNS"] = str(MIN_COLUMNS)
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_bool_rule)
    stderr = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    if description:
        options["description"] = description
    try:
        with contextlib.redirect_stderr(stderr):
            parsed: T = tyro.cli(
                shown,
                args=args,
                prog=prog,
                use_underscores=True,
                registry=registry,
                config=(tyro.conf.FlagConversionOff,),
                **options,
            )
            return parsed
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise UserError(_one_line(stderr.getvalue(), prog, cls, args))


def _with_help(cls: type[T]) -> type[T]:
    """Give the fields their docstrings as paragraphs; tyro by itself keeps the line breaks."""
    hints, described = get_type_hints(cls, include_extras=True), {}
    for base in reversed(cls.__mro__[:-1]):
        for doc in docstring_parser.parse_from_object(base).params:
            help_text = tyro.conf.arg(help=" ".join((doc.description or "").split()))
            described[doc.arg_name] = Annotated[hints[doc.arg_name], help_text]
    return type(cls.__name__, (cls,), {"__doc__": cls.__doc__, "__annotations__": described})


def normalize_flags(cls: type, args: Sequence[str]) -> list[str]:
    """Replace old spellings of the flags of `cls`, and give switches without a value theirs.

    A bare `--restart` is `--restart true`, and `--out_dir=~/run` lies in the home folder.
    """
    types = {field.name: field.type for field in fields(cls)}
    switches = {name for name, hint in types.items() if hint is bool} | {"compile"} & set(types)
    normalized = []
    for arg, following in zip_longest(args, args[1:], fillvalue="--"):
        name, equals, value = _split(arg)
        new = RENAMED_FLAGS.get(name)
        if name not in types and new in types:
            name, arg = new, f"--{new}{equals}{value}"
        if value.startswith("~/") and name not in ("", "prompt", "stop"):
            # Shells expand it only at the start of a word.
            arg = f"--{name}={Path(value).expanduser().as_posix()}"
        normalized.append(arg)
        # Commands other than train take a RUN, which may follow a switch.
        is_value = following.lower() in BOOLEANS or (
            issubclass(cls, Config) and not following.startswith("--")
        )
        if name in switches and not equals and not is_value:
            normalized.append("true")
    return normalized


def _bool_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    if info.type is not bool:
        return None

    def parse(args: list[str]) -> bool:
        if args[0].lower() not in BOOLEANS:
            raise ValueError(f"must be true or false, not {args[0]}")
        return BOOLEANS[args[0].lower()]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: ["true" if value else "false"],
    )


def _one_line(box: str, prog: str, cls: type, args: Sequence[str]) -> str:
    """Say what is wrong with `args`: unknown flags, else the mistake in tyro's boxed message."""
    inner = [line.strip("│ ") for line in box.splitlines()[1:-1]]
    # Horizontal rules divide the box: the mistake is above the first one.
    sections = " ".join("\n" if set(line) == {"─"} else line for line in inner).split("\n")
    mistake, needs = sections[0].strip(), ""
    if mistake.startswith("Missing from"):
        # Names are indented by four columns, and their descriptions by eight.
        listed = re.split("Unrecognized options|For full helptext", box)[0]
        missing = re.findall(r"^│ {5}(\S+)", listed, re.MULTILINE)
        hint = f"; {runs_hint()}" if "RUN" in missing else ""
        mistake = needs = f"{prog} needs {' and '.join(missing)}{hint}"
    names = [field.name for field in fields(cls)]
    flags = [arg.partition("=")[0] for arg in args if re.match("--?[A-Za-z]", arg)]
    if no_value := re.match(r"Missing value for argument '(-\S+)'", mistake):
        mistake = f"{no_value[1]} needs a value"
    elif unknown := [flag for flag in flags if _split(flag)[0] not in names]:
        name = _split(unknown[0])[0]
        close = [FOREIGN_FLAGS.get(name), *difflib.get_close_matches(name, names, n=1)]
        hint = next((f"did you mean --{other}?" for other in close if other in names), "")
        mistakes = [f"Unrecognized options: {', '.join(unknown)}", hint, needs]
        mistake = "; ".join(filter(None, mistakes))
    elif with_flag := re.match(r"Missing value for argument '(\S+)'", mistake):
        mistake = f"{prog} takes {with_flag[1].upper()} without a flag"
    elif choice := re.match(r"invalid choice (.+) for argument '(\S+)'\. .* \((.+)\)", mistake):
        value, name, choices = choice.groups()
        choices = choices.replace("'', ", "")  # the default of a flag that was not given
        name = name if name.startswith("-") else name.upper()
        mistake = f"{name} must be one of {choices}, not {value}".replace("'", "")
    mistake = re.sub(r"^Error parsing (--\w+):", r"\1", mistake)
    for python_words, words in NUMBER_ERRORS.items():
        mistake = mistake.replace(python_words, words)
    several = re.match(r"--(\w+) must be an? .*, not '(\S+,\S+)'", mistake)
    if several and "grid" in names:
        mistake += f"; several values: --grid {several[1]}={several[2]}"
    return f"{mistake} (see {prog} --help)"
