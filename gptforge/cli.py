"""The command line: `gptforge` and `python gpt.py`. With no command it trains.

Nothing heavy is imported before it is needed, so that `--help` and a mistyped flag answer at once.
"""

import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from gptforge.config import FIELDS, Config, merge, read_toml
from gptforge.errors import RunError, UserError
from gptforge.presets import PRESETS, preset

T = TypeVar("T")
BOOLEANS = {"true": True, "false": False}
MISTAKE, FAILURE = 2, 1


@dataclass(frozen=True)
class SampleArgs:
    """Write with a trained model: the prompt and its continuation go to standard output."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder or checkpoint folder."""
    prompt: str = ""
    """Text to go on from."""
    max_new_tokens: int = 300
    """Tokens to write."""
    temperature: float = 0.8
    """Below 1 tamer, above 1 wilder; 0: always the likeliest token."""
    top_k: int = 200
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this much probability."""
    stop: str = ""
    """End before this text."""
    seed: int = 1337
    """The same seed writes the same text."""
    num_samples: int = 1
    """Texts to write, with seeds that follow each other."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True)
class EvalArgs:
    """Judge a trained model: loss, perplexity and bits per byte on text it has not learned."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder or checkpoint folder."""
    data: str = ""
    """Text file to judge by, all of it; empty: the part that the run held out."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A Windows pipe may not know the summary's lines or a text's letters.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    is_traced = os.environ.get("GPTFORGE_DEBUG") == "1"
    try:
        return _dispatch(args)
    except (UserError, RunError) as error:
        if is_traced:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE if isinstance(error, UserError) else FAILURE
    except KeyboardInterrupt:
        if is_traced:
            raise
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(args: list[str]) -> int:
    if args and not args[0].startswith("-"):
        if args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command '{args[0]}'; {hint}")
        return COMMANDS[args[0]](args[1:])
    if args == ["--version"]:
        from gptforge import __version__

        print(f"gptforge {__version__}")
        return 0
    return train(args)


def train(args: list[str]) -> int:
    """`gptforge [train]`: train a model, or go on with one."""
    config, given = parse_train(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "training on several processes is not built yet: start one, without torchrun"
        )
    config, given = _with_preset(config, given)
    import torch

    from gptforge.build import build_trainer
    from gptforge.train.guards import EXIT_CODES

    try:
        trainer = build_trainer(config, given=given, command=args, say=_say)
        if trainer is None:
            return 0
        reason = trainer.run()
    except torch.OutOfMemoryError:
        half = max(1, config.batch_size // 2)
        steps = -(-config.global_batch // half)
        raise RunError(
            f"the device ran out of memory with --batch_size {config.batch_size}: try --batch_size "
            f"{half} --gradient_accumulation_steps {steps}, which learns the same"
        ) from None
    if reason != "finished":
        print(f"To go on: python gpt.py {_quote(args)}".rstrip())
    return EXIT_CODES[reason]


def sample(args: list[str]) -> int:
    """`gptforge sample RUN`: write with a trained model."""
    asked = _parse(SampleArgs, args, "gptforge sample")
    if asked.num_samples < 1:
        raise UserError(f"--num_samples must be 1 or more, not {asked.num_samples}")
    from gptforge.build import load

    writer = load(asked.run, device=asked.device)
    for number in range(asked.num_samples):
        if number:
            print("---")
        print(asked.prompt, end="", flush=True)
        pieces = writer.stream(
            asked.prompt,
            asked.max_new_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            stop=[asked.stop],
            seed=asked.seed + number,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


def evaluate(args: list[str]) -> int:
    """`gptforge eval RUN`: judge a trained model by held-out text."""
    asked = _parse(EvalArgs, args, "gptforge eval")
    from gptforge.build import evaluate_run

    score = evaluate_run(asked.run, data=asked.data, device=asked.device)
    facts = {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }
    if asked.json:
        print(json.dumps(facts))
    else:
        print(
            f"held-out loss {score.loss:.4f} nats per token, perplexity {score.perplexity:.2f}, "
            f"{score.bits_per_byte:.4f} bits per byte, over {score.tokens:,} tokens"
        )
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "sample": sample,
    "eval": evaluate,
}


def parse_train(args: Sequence[str]) -> tuple[Config, frozenset[str]]:
    """Built-in values, preset, file and flags, laid over each other in this order.

    Returns:
        The configuration, with an empty `preset` where none was named, and the names of the fields
        set by hand, in the file or by flags.
    """
    asks_help = "-h" in args or "--help" in args
    flags = _flag_values(args)
    from_file = read_toml(Path(flags["config"])) if flags.get("config") else {}
    name = flags.get("preset") or from_file.get("preset")
    base = preset(str(name)) if name else Config()
    base = merge(base, from_file, source=f"--config {flags.get('config')}")
    names = ", ".join(PRESETS)
    description = f"Train a GPT-2. Commands: {', '.join(COMMANDS)}. Presets: {names}."
    parsed = _parse(Config, args, "gptforge", default=base, description=description)
    assert not asks_help, "tyro prints the help and leaves"
    return parsed, frozenset(flags) | frozenset(from_file)


def _with_preset(config: Config, given: frozenset[str]) -> tuple[Config, frozenset[str]]:
    """Choose the preset where none was named, and make its warmup fit; says what it does."""
    if not config.preset:
        import torch

        has_cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
        has_cuda |= config.device.startswith("cuda:")
        name = "gpt2" if has_cuda else "shakespeare-cpu"
        why = "there is a CUDA GPU" if has_cuda else "no CUDA GPU is used"
        _say(
            f"preset: {name} ({PRESETS[name].about}), because {why}; choose with --preset: "
            f"{', '.join(PRESETS)}"
        )
        by_hand = {field: getattr(config, field) for field in given}
        config = merge(preset(name), by_hand | {"preset": name}, source="flags")
    else:
        _say(f"preset: {config.preset} ({PRESETS[config.preset].about})")
    if "warmup_steps" not in given and config.warmup_steps > config.max_steps >= 1:
        shorter = max(1, config.max_steps // 10)
        _say(f"note: the preset's warmup of {config.warmup_steps} steps is cut to {shorter}")
        config = merge(config, {"warmup_steps": shorter}, source="flags")
    return config, given


def _flag_values(args: Sequence[str]) -> dict[str, str]:
    """Training flags that stand in `args`, with underscores, and the values that follow them."""
    found = {}
    for place, word in enumerate(args):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in FIELDS:
            following = args[place + 1] if place + 1 < len(args) else ""
            found[name] = value if equals else following
    return found


def _parse(
    kind: type[T], args: Sequence[str], prog: str, *, default: Any = None, description: str = ""
) -> T:
    """Flags into a dataclass, by tyro; its boxed errors become one UserError."""
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_boolean_rule)
    boxed = io.StringIO()
    extra: dict[str, Any] = {} if default is None else {"default": default}
    if description:
        extra["description"] = description
    try:
        with contextlib.redirect_stderr(boxed):
            parsed: T = tyro.cli(
                kind,
                args=_spell_out_booleans(kind, args),
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


def _spell_out_booleans(kind: type, args: Sequence[str]) -> list[str]:
    """`--overwrite` alone means `--overwrite true`; likewise `--compile`."""
    hints = kind.__annotations__
    switches = {name for name, hint in hints.items() if hint is bool} | {"compile"} & set(hints)
    spelled = []
    for place, word in enumerate(args):
        spelled.append(word)
        following = args[place + 1] if place + 1 < len(args) else "--"
        if word.removeprefix("--").replace("-", "_") in switches and following.startswith("--"):
            spelled.append("true")
    return spelled


def _unboxed(text: str, prog: str) -> str:
    """The words of tyro's boxed message: what is wrong, and what was perhaps meant."""
    inner = [line.strip("│ ") for line in text.splitlines()[1:-1]]
    # Rules part the box: the mistake stands above the first one.
    sections = " ".join("\n" if set(line) == {"─"} else line for line in inner).split("\n")
    what = sections[0].strip()
    meant = re.search(r"Perhaps you meant:\s+(--\w+)", text.replace("│", ""))
    hint = f"; did you mean {meant[1]}?" if meant else ""
    return f"{what}{hint} (see {prog} --help)"


def _say(text: str) -> None:
    from gptforge.report.console import PlainConsole

    PlainConsole().say(text)


def _quote(args: Sequence[str]) -> str:
    import shlex

    # --overwrite would throw away what is to be gone on with.
    kept = _spell_out_booleans(Config, args)
    while "--overwrite" in kept:
        place = kept.index("--overwrite")
        del kept[place : place + 2]
    return shlex.join(kept)
