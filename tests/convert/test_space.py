"""The Space: complete, and running where gptforge itself is not installed."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pytest

from gptforge import load
from tests.train.runs import build


@pytest.fixture
def space(config, program, tmp_path) -> Path:
    build(config).fit()
    done = program("export", config.out_dir, "--to", "space", "space")
    assert (done.code, done.out) == (0, ""), done.err
    return tmp_path / "space"


def test_it_is_complete_and_a_run_folder_too(space, config) -> None:
    card = (space / "README.md").read_text(encoding="utf-8")
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert front["sdk"] == "gradio"
    assert front["title"] == '"run"'
    assert "license" not in front
    # The page is called as the run was, wherever the folder lies.
    assert "title='run'" in (space / "app.py").read_text(encoding="utf-8")
    assert (space / front["app_file"]).is_file()
    assert "bits per byte" in card
    # There is no c in the text.
    assert "Once" not in card
    assert "input.txt" not in {path.name for path in space.rglob("*")}
    ours, theirs = load(config.out_dir, device="cpu"), load(space, device="cpu")
    assert theirs.generate("ROMEO:", 20, seed=1) == ours.generate("ROMEO:", 20, seed=1)
    # A copy without its symbolic links, as an upload makes it, is still a run.
    for which in ("best", "last"):
        (space / "checkpoints" / which).unlink()
    assert load(space, device="cpu").generate("ROMEO:", 20, seed=1)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The Python of a fresh environment with the packages of this one, but without gptforge."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = python_of(tmp_path / "venv")
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    packages = next(
        entry for entry in map(Path, sys.path) if entry.name in ("site-packages", "dist-packages")
    )
    Path(found.stdout.strip(), "others.pth").write_text(f"{packages}\n")
    return python


def python_of(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def quiet() -> dict[str, str]:
    """Nothing of this project's own on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def serve_and_write(python: Path, space: Path) -> None:
    """Start the app, fetch its page, and have a text written through it."""
    code = (
        "import gptforge; from pathlib import Path; import app\n"
        "assert Path(gptforge.__file__).parent.parent == Path.cwd(), gptforge.__file__\n"
        "app.launch('.', host='127.0.0.1', device='cpu')\n"
    )
    process = subprocess.Popen(
        [python, "-c", code], cwd=space, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=quiet(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert address, first + process.stdout.read()
        with urllib.request.urlopen(address[0], timeout=30) as page:
            assert "gradio" in page.read().decode()
        asked = json.dumps({"prompt": "ROMEO:", "max_tokens": 20, "seed": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address[0]}/v1/completions", asked, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 20
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_it_runs_where_gptforge_is_not_installed(space, elsewhere) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed")
    serve_and_write(elsewhere, space)


@pytest.mark.timeout(1200)
@pytest.mark.skipif("GPTFORGE_FRESH" not in os.environ, reason="GPTFORGE_FRESH=1 installs it all")
def test_it_runs_in_an_environment_made_from_its_requirements(space, tmp_path) -> None:
    # Minutes, and a package index: torch in the version that is here, the rest as it comes.
    venv.create(tmp_path / "fresh", with_pip=True)
    python = python_of(tmp_path / "fresh")
    torch = importlib.metadata.version("torch").split("+")[0]
    for wanted in ([f"torch=={torch}"], ["-r", str(space / "requirements.txt")]):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    serve_and_write(python, space)
