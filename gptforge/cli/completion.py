"""`gptforge completion SHELL`: commands, flags and their values by the Tab key."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from gptforge.cli.parsing import BOOLEANS, parse_args
from gptforge.presets import PRESETS

HINT = """Completion by the Tab key: put this line into the file that your shell reads at its start.
  ~/.bashrc                   eval "$(gptforge completion bash)"
  ~/.zshrc                    eval "$(gptforge completion zsh)"
  ~/.config/fish/config.fish  gptforge completion fish | source"""
SUBCOMMANDS = {"tokenizer": ("train",), "completion": ("bash", "zsh", "fish")}
VALUES = {"preset": tuple(PRESETS), "device": ("auto", "cpu", "cuda", "mps")}

BASH = """_gptforge() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
  # Bash takes --flag=value for three words.
  [[ $cur == = ]] && cur=
  [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}
  if [[ $cur == -* ]]; then
    case ${COMP_WORDS[1]} in
FLAGS
    esac
  elif [[ $prev == --* ]]; then
    case $prev in
VALUES
    esac
  elif [[ $COMP_CWORD == 1 ]]; then
    words="COMMANDS"
  elif [[ $COMP_CWORD == 2 ]]; then
    case ${COMP_WORDS[1]} in
SUBCOMMANDS
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
# Where none of these fits, the names of files.
complete -o default -F _gptforge gptforge
"""


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script that completes commands, flags and values."""

    shell: Annotated[
        tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")
    ]
    """bash, zsh or fish."""


def main(argv: list[str]) -> None:
    """Print the script for a shell."""
    from gptforge.cli import COMMANDS

    shell = parse_args(CompletionArgs, argv, "gptforge completion").shell
    flags = {name: _flags(cls) for name, (_, cls, _) in COMMANDS.items()}
    if shell == "fish":
        print(_fish_script(flags, {name: about for name, (_, _, about) in COMMANDS.items()}))
        return
    if shell == "zsh":
        print("autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit")
    values = {f"--{name}": values for named in flags.values() for name, values in named.items()}
    # `train` may be left out.
    flags_cases = {"*" if c == "train" else c: [f"--{f}" for f in flags[c]] for c in flags}
    flags_cases["*"] = [*flags_cases.pop("*"), "--help", "--version"]
    print(
        BASH.replace("SUBCOMMANDS", _cases(SUBCOMMANDS))
        .replace("COMMANDS", " ".join(flags))
        .replace("FLAGS", _cases(flags_cases))
        .replace("VALUES", _cases({name: words for name, words in values.items() if words})),
        end="",
    )


def _flags(cls: type) -> dict[str, tuple[str, ...]]:
    """The flags of a command, without dashes, and the values that each can take, if few."""
    flags = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if tyro.conf.Positional in getattr(hint, "__metadata__", ()):
            continue
        choices = tuple(BOOLEANS) if hint is bool else ()
        if typing.get_origin(hint) is Literal:
            choices = tuple(choice for choice in typing.get_args(hint) if choice)
        flags[name] = VALUES.get(name, choices)
    return flags


def _cases(words: Mapping[str, typing.Iterable[str]]) -> str:
    return "\n".join(f'      {name}) words="{" ".join(w)}" ;;' for name, w in words.items())


def _fish_script(
    flags: Mapping[str, Mapping[str, tuple[str, ...]]], commands: Mapping[str, str]
) -> str:
    others = " ".join(name for name in commands if name != "train")
    lines = [f"function __gptforge_trains; not __fish_seen_subcommand_from {others}; end"]
    for name, about in commands.items():
        lines.append(f"complete -c gptforge -n __fish_use_subcommand -a {name} -d '{about}'")
        is_train = name == "train"
        seen = "__gptforge_trains" if is_train else f"__fish_seen_subcommand_from {name}"
        for word in SUBCOMMANDS.get(name, ()):
            lines.append(f"complete -c gptforge -n '{seen}' -a {word}")
        for flag, values in flags[name].items():
            takes = f"-x -a '{' '.join(values)}'" if values else "-r"
            lines.append(f"complete -c gptforge -n '{seen}' -l {flag} {takes}")
    return "\n".join(lines)
