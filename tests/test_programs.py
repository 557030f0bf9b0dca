"""Benchmarks and scripts, of which some need a GPU, use names and arguments that exist."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("benchmarks", "scripts", "examples", "tests/faults")
    for path in (ROOT / folder).glob("*.py")
)


def imported(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """What a program imports from this package, under its name there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gptforge"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                yield alias.asname or alias.name, getattr(module, alias.name)


def called(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object that an expression such as `matmul.linear` names; None if it is another's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := called(node.value, names)):
        return getattr(module, node.attr)
    return None


@pytest.mark.parametrize("path", PROGRAMS)
def test_imports_and_calls_fit_the_package(path) -> None:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    names = dict(imported(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not callable(function := called(node.func, names)):
            continue
        keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
        is_complete = len(keywords) == len(node.keywords)
        is_complete &= not any(isinstance(arg, ast.Starred) for arg in node.args)
        signature = inspect.signature(function)
        try:
            bind = signature.bind if is_complete else signature.bind_partial
            bind(*[None for arg in node.args if not isinstance(arg, ast.Starred)], **keywords)
        except TypeError as error:
            pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node)}: {error}")
