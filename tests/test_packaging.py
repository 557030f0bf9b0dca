"""What people install: the extras that messages and docs name, and how they are told to."""

import email
import re
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from gptforge.convert.space import REQUIREMENTS
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


def test_a_space_requires_what_the_package_does() -> None:
    wanted = set(REQUIREMENTS.splitlines())
    assert set(PROJECT["dependencies"]) < wanted
    assert wanted - set(PROJECT["dependencies"]) == set(PROJECT["optional-dependencies"]["demo"])


def test_an_extra_that_is_repeated_for_the_tests_has_the_same_floor() -> None:
    extras = PROJECT["optional-dependencies"]
    floors: dict[str, set[str]] = {}
    for line in (line for lines in extras.values() for line in lines):
        floors.setdefault(re.split(r"[<>=]", line)[0], set()).add(line)
    assert {name: lines for name, lines in floors.items() if len(lines) > 1} == {}


@pytest.mark.parametrize("is_checkout", [True, False])
def test_an_install_hint_names_the_checkout(monkeypatch, tmp_path, is_checkout) -> None:
    from gptforge import errors

    monkeypatch.setattr(errors, "__file__", str(tmp_path / "gptforge/errors.py"))
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    place = tmp_path.as_posix() if is_checkout else "a checkout of GPT-Forge"
    assert install_hint("hf") == f"pip install -e '.[hf]' in {place}"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> dict[str, bytes]:
    """Files of the source archive, by their names in it."""
    sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
    pytest.importorskip("hatch_fancy_pypi_readme", reason="its plugin is not installed")
    folder = tmp_path_factory.mktemp("dist")
    [path] = sdist.SdistBuilder(str(ROOT)).build(directory=str(folder))
    with tarfile.open(path) as tar:
        return {
            member.name.partition("/")[2]: tar.extractfile(member).read()
            for member in tar.getmembers()
            if member.isfile()
        }


def test_the_source_archive_has_every_file_of_the_repository(archive) -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = {name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()}
    assert tracked - {".gitattributes"} <= set(archive)


def test_the_description_for_a_package_index_has_no_link_that_leads_nowhere(archive) -> None:
    text = email.message_from_bytes(archive["PKG-INFO"]).get_payload(decode=True).decode()
    assert "# GPT-Forge" in text
    assert "Use what you trained has the rest" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [link for link in targets if not link.startswith("https://")] == []


def test_links_of_readme_and_docs_lead_to_files_that_exist() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8")):
            if not link.startswith(("https://", "http://", "mailto:")):
                assert (path.parent / link).exists(), f"{path.name}: {link}"
