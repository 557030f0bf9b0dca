"""Docs and comments name files, functions and flags that exist."""

import contextlib
import functools
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptforge.cli import COMMANDS, main
from tests.faults.faults import FAULTS

ROOT = Path(__file__).parents[1]
FOLDERS = ("gptforge", "tests", "benchmarks", "scripts", "examples", "docs")
PAGES = {
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md"))
    # The changelog has names of earlier versions too.
    if path.name != "CHANGELOG.md"
}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILE = re.compile(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|md|toml|sh|txt)\b")
INSTALLED_ONLY = "gptforge/data/input.txt"
FUNCTION = re.compile(r"`([a-z_.]+)\.(\w+)(?:\(\))?`")
EXTENSIONS = {
    "bin",
    "csv",
    "gguf",
    "html",
    "json",
    "jsonl",
    "md",
    "png",
    "py",
    "safetensors",
    "toml",
    "txt",
    "yml",
}
COMMAND = re.compile(r"(?:gptforge|gpt\.py) ([^`#|;&\n]+)")
SCRIPT = re.compile(r"python ((?:benchmarks|scripts)/\w+\.py)([^`#|;&\n]*)")
FLAG = re.compile(r"(?<!\S)--([a-z]\w*)")


def test_named_files_exist() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {file}"
        for path in (*PAGES, *SOURCES)
        for file in FILE.findall(path.read_text("utf-8"))
        if file != INSTALLED_ONLY and not (ROOT / file).exists()
    }
    assert missing == set()


@functools.cache
def sources_of(module: str) -> list[str]:
    """Sources of a module, which may be named without the packages that it is in."""
    parts = module.split(".")
    return [
        path.read_text("utf-8")
        for path in (ROOT / "gptforge").rglob(f"{parts[-1]}.py")
        if list(path.relative_to(ROOT).with_suffix("").parts[-len(parts) :]) == parts
    ]


def test_named_functions_exist() -> None:
    missing = set()
    for path in (*PAGES, *SOURCES):
        for module, name in FUNCTION.findall(path.read_text("utf-8")):
            if name in EXTENSIONS or sources_of(f"{module}.{name}"):
                continue
            definition = re.compile(rf"(?m)^\s*(?:def|class) {name}\b|^\s*{name}\b.*=")
            sources = sources_of(module)
            if sources and not any(map(definition.search, sources)):
                missing.add(f"{path.relative_to(ROOT)}: {module}.{name}")
    assert missing == set()


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Flags by command, as its help shows them: without old spellings."""

    def shown(*args: str) -> set[str]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([*args, "--help"])
        return {"help", *re.findall(r"--(\w+)", output.getvalue())}

    return {name: shown(name, *["train"][: name == "tokenizer"]) for name in COMMANDS}


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """Commands of the program in a page, with their arguments."""
    for args in COMMAND.findall(text):
        first = args.split()[0] if args.strip() else ""
        if first in COMMANDS or first.startswith("--"):
            yield first if first in COMMANDS else "train", args


def test_flags_in_commands_exist(flags) -> None:
    unknown, count = set(), 0
    for path in PAGES:
        text = path.read_text("utf-8").replace("\\\n", " ")
        found = {(name, flag) for name, args in commands_in(text) for flag in FLAG.findall(args)}
        for script, args in SCRIPT.findall(text):
            # What follows -- is for the program.
            script_args, _, passed_on = args.partition(" -- ")
            found |= {("train", flag) for flag in FLAG.findall(passed_on)}
            source = (ROOT / script).read_text("utf-8")
            flags[script] = set(re.findall(r'"--(\w+)"', source))
            found |= {(script, flag) for flag in FLAG.findall(script_args)}
        count += len(found)
        unknown |= {f"{path.name}: {name} --{flag}" for name, flag in found - allowed(flags)}
    assert unknown == set()
    assert count > 50


def allowed(flags: dict[str, set[str]]) -> set[tuple[str, str]]:
    return {(name, flag) for name, known in flags.items() for flag in known}


def test_table_of_faults_names_those_that_are_injected() -> None:
    table = re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "docs/results/faults.md").read_text("utf-8"))
    assert set(table) == set(FAULTS)
