"""Extras, install commands, the wheel and the source archive, and links in the docs."""

import email
import re
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from gptforge.convert.space import FILES
from gptforge.errors import install_hint

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FOLDERS = ("gptforge", "docs", "tests", "benchmarks", "examples", "scripts")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md", "*.ipynb", "*.toml")
    for folder in FOLDERS
    for path in (ROOT / folder).rglob(pattern)
) + sorted(ROOT.glob("*.md"))


def test_nothing_says_to_install_from_a_package_index() -> None:
    # The name may belong to another project there: install from a checkout.
    pattern = re.compile(r"(pip install|uv add|pipx? \w+)[^\n`]*[ '\"]gptforge(?![\w./-])", re.I)
    found = [
        path.relative_to(ROOT).as_posix()
        for path in TEXTS
        if path != Path(__file__) and pattern.search(path.read_text("utf-8"))
    ]
    assert found == []


def test_extras_in_texts_exist() -> None:
    extras = set(PROJECT["optional-dependencies"])
    named = {
        extra
        for path in (*TEXTS, *WORKFLOWS, ROOT / "Dockerfile")
        for extras in re.findall(r"'(?:\.|/src)\[([\w,-]+)\]'", path.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert {"test", "demo", "hf", "gguf", "data"} <= named <= extras


def test_python_versions_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    versions = {c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)}
    tested = set(re.findall(r'"3\.(\d+)"', (ROOT / ".github/workflows/ci.yml").read_text("utf-8")))
    assert versions == tested == {"11", "12", "13", "14"}
    assert PROJECT["requires-python"] == ">=3.11"


def test_requirements_of_a_space() -> None:
    required = set((FILES / "requirements.txt").read_text("utf-8").splitlines())
    assert set(PROJECT["dependencies"]) < required
    assert required - set(PROJECT["dependencies"]) == set(PROJECT["optional-dependencies"]["demo"])


def test_repeated_requirements_have_the_same_version() -> None:
    extras = PROJECT["optional-dependencies"]
    versions: dict[str, set[str]] = {}
    for line in (line for lines in extras.values() for line in lines):
        versions.setdefault(re.split(r"[<>=]", line)[0], set()).add(line)
    assert {name: lines for name, lines in versions.items() if len(lines) > 1} == {}


@pytest.mark.parametrize("is_checkout", [True, False])
def test_install_hint_names_the_checkout(monkeypatch, tmp_path, is_checkout) -> None:
    from gptforge import errors

    monkeypatch.setattr(errors, "__file__", str(tmp_path / "gptforge/errors.py"))
    if is_checkout:
        (tmp_path / "pyproject.toml").touch()
    folder = tmp_path.as_posix() if is_checkout else "a checkout of GPT-Forge"
    assert install_hint("hf") == f"pip install -e '.[hf]' in {folder}"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> dict[str, bytes]:
    """Names and contents of the files in the source archive."""
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


def test_source_archive_is_complete(archive) -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = {name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()}
    assert tracked - {".gitattributes"} <= set(archive)


def test_wheel_has_the_text_and_all_that_the_program_reads(tmp_path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    pytest.importorskip("hatch_fancy_pypi_readme", reason="its plugin is not installed")
    [path] = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        assert archive.read("gptforge/data/input.txt") == (ROOT / "input.txt").read_bytes()
    files = (path for path in (ROOT / "gptforge").rglob("*") if path.is_file())
    # Also without the temporary names under which Python writes compiled modules.
    files = (path for path in files if path.parent.name != "__pycache__")
    program = {path.relative_to(ROOT).as_posix() for path in files}
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == program | {"gptforge/data/input.txt"}


def test_package_description_has_no_relative_links(archive) -> None:
    text = email.message_from_bytes(archive["PKG-INFO"]).get_payload(decode=True).decode()
    assert "# GPT-Forge" in text
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [link for link in targets if not link.startswith("https://")] == []


def test_links_in_the_docs_exist() -> None:
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text("utf-8")):
            if not link.startswith(("https://", "http://", "mailto:")):
                assert (path.parent / link).exists(), f"{path.name}: {link}"
