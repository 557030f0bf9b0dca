"""What people install: the extras that messages and docs name, and how they are told to."""

import re
import tomllib
from pathlib import Path

import pytest

from gptforge.errors import install_hint

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PLACES = ("gptforge", "docs", "tests", "benchmarks", "examples", "scripts")
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md", "*.ipynb", "*.toml")
    for place in PLACES
    for path in (ROOT / place).rglob(pattern)
) + sorted(ROOT.glob("*.md"))


def test_nobody_is_told_to_install_the_name_from_an_index() -> None:
    # The name there may be somebody else's: everything is installed from a checkout.
    pattern = re.compile(r"(pip install|uv add|pipx? \w+)[^\n`]*[ '\"]gptforge(?![\w./-])", re.I)
    named = [
        path.relative_to(ROOT).as_posix()
        for path in TEXTS
        if path != Path(__file__) and pattern.search(path.read_text("utf-8"))
    ]
    assert named == []


def test_every_extra_that_is_named_exists() -> None:
    extras = set(PROJECT["optional-dependencies"])
    named = {
        extra
        for path in TEXTS
        for extras in re.findall(r"-e '\.\[([\w,-]+)\]'", path.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert {"test", "demo", "hf"} <= named <= extras


@pytest.mark.parametrize("is_checkout", [True, False])
def test_an_install_hint_names_the_checkout(monkeypatch, tmp_path, is_checkout) -> None:
    from gptforge import errors

    monkeypatch.setattr(errors, "__file__", str(tmp_path / "gptforge/errors.py"))
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    place = tmp_path.as_posix() if is_checkout else "a checkout of GPT-Forge"
    assert install_hint("hf") == f"pip install -e '.[hf]' in {place}"
