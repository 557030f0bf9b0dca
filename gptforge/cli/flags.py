"""Flags into configurations: precedence, spelling, and mistakes said in one line."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from gptforge.config import (
    FIELDS,
    Config,
    merge,
    read_toml,
)
from gptforge.errors import UserError
from gptforge.presets import PRESETS, get_preset

T = TypeVar("T")
BOOLEANS = {"true": True, "false": False}


def parse_train_args(
    args: Sequence[str],
    *,
    cls: type[Config] = Config,
    prog: str = "gptforge",
    epilog: str = "",
) -> tuple[Config, frozenset[str]]:
    """Built-in values, preset, file and flags, laid over each other in this order.

    Args:
        args: the words behind the command.
        kind: the configuration, perhaps with fields that a command adds.
        prog: how the command is called, for its help and its errors.
        more: said in its help, below what there is to say of the presets.

    Returns:
        The configuration, with an empty `preset` where none was named, and the names of the fields
        set by hand, in the file or by flags.
    """
    flags = flag_values(args)
    from_file, is_a_runs = read_toml(Path(flags["config"])) if flags.get("config") else ({}, False)
    name = flags.get("preset") or from_file.get("preset")
    base = get_preset(str(name)) if name else Config()
    base = merge(base, from_file, source=f"--config {flags.get('config')}")
    description = f"{(cls.__doc__ or '').strip()} Presets: {', '.join(PRESETS)}.{epilog}"
    default = cls(**vars(base))
    parsed = parse_args(cls, args, prog, default=default, description=description)
    return parsed, frozenset(flags) | (frozenset() if is_a_runs else frozenset(from_file))


def resolve_preset(
    config: Config, explicit: frozenset[str], *, log: Callable[[str], None]
) -> Config:
    """Choose the preset where none was named, and make its warmup fit; says what it does."""
    if not config.preset:
        import torch

        has_cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
        has_cuda |= config.device.startswith("cuda:")
        name = "gpt2" if has_cuda else "shakespeare-cpu"
        why = "there is a CUDA GPU" if has_cuda else "no CUDA GPU is used"
        log(
            f"preset: {name} ({PRESETS[name].description}), because {why}; choose with --preset: "
            f"{', '.join(PRESETS)}"
        )
        by_hand = {field: getattr(config, field) for field in explicit}
        config = merge(get_preset(name), by_hand | {"preset": name}, source="flags")
    else:
        log(f"preset: {config.preset} ({PRESETS[config.preset].description})")
    if "warmup_steps" not in explicit and config.warmup_steps > config.max_steps >= 1:
        shorter = max(1, config.max_steps // 10)
        config = merge(config, {"warmup_steps": shorter}, source="flags")
    return config


def flag_values(args: Sequence[str]) -> dict[str, str]:
    """Training flags that stand in `args`, with underscores, and the values that follow them."""
    found = {}
    for place, word in enumerate(args):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in FIELDS:
            following = args[place + 1] if place + 1 < len(args) else ""
            found[name] = value if equals else following
    return found


def parse_args(
    cls: type[T], args: Sequence[str], prog: str, *, default: Any = None, description: str = ""
) -> T:
    """Flags into a dataclass, by tyro; its boxed errors become one UserError."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_boolean_rule)
    registry.primitive_rule(_number_rule)
    boxed = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    if description:
        extra["description"] = description
    try:
        with contextlib.redirect_stderr(boxed):
            parsed: T = tyro.cli(
                cls,
                args=expand_bool_flags(cls, args),
                prog=prog,
                use_underscores=True,
                registry=registry,
                config=(tyro.conf.FlagConversionOff,),
                **extra,
            )
            return parsed
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
    raise UserError(_unboxed(boxed.getvalue(), prog))


def _boolean_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    """Booleans take `true` or `false`."""
    if info.type is not bool:
        return None

    def parse(words: list[str]) -> bool:
        if words[0].lower() not in BOOLEANS:
            raise ValueError(f"give true or false, not {words[0]}")
        return BOOLEANS[words[0].lower()]

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: ["true" if value else "false"],
    )


def _number_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    """Numbers, with a mistake said in our words."""
    kinds: dict[object, str] = {int: "a whole number", float: "a number"}
    if info.type not in kinds:
        return None

    def parse(words: list[str]) -> float:
        try:
            number: float = info.type(words[0])
        except ValueError:
            raise ValueError(f"give {kinds[info.type]}, not {words[0]}") from None
        return number

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT" if info.type is int else "FLOAT",
        instance_from_str=parse,
        is_instance=lambda value: type(value) in (int, info.type),
        str_from_instance=lambda value: [str(value)],
    )


def expand_bool_flags(cls: type, args: Sequence[str]) -> list[str]:
    """`--overwrite` alone means `--overwrite true`; likewise `--compile`."""
    hints = {name: hint for c in cls.__mro__ for name, hint in _own_hints(c).items()}
    switches = {name for name, hint in hints.items() if hint is bool} | {"compile"} & set(hints)
    spelled = []
    for place, word in enumerate(args):
        spelled.append(word)
        following = args[place + 1] if place + 1 < len(args) else "--"
        # Where a command takes a RUN, the word behind a switch may be that.
        is_value = following in BOOLEANS or (
            issubclass(cls, Config) and not following.startswith("--")
        )
        name = word.removeprefix("--").replace("-", "_")
        # A value may be called as a switch is: `--out_dir shuffle`.
        if word.startswith("--") and name in switches and not is_value:
            spelled.append("true")
    return spelled


def _own_hints(kind: type) -> dict[str, Any]:
    return kind.__annotations__ if dataclasses.is_dataclass(kind) else {}


def _unboxed(text: str, prog: str) -> str:
    """The words of tyro's boxed message: what is wrong, and what was perhaps meant."""
    inner = [line.strip("│ ") for line in text.splitlines()[1:-1]]
    # Rules part the box: the mistake stands above the first one.
    sections = " ".join("\n" if set(line) == {"─"} else line for line in inner).split("\n")
    what = sections[0].strip()
    meant = re.search(r"Perhaps you meant:\s+(--\w+)", text.replace("│", ""))
    hint = f"; did you mean {meant[1]}?" if meant else ""
    return f"{what}{hint} (see {prog} --help)"
