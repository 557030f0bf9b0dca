"""Exported Spaces are complete and run without gptforge being installed."""

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import subprocess
import urllib.request
import venv
from pathlib import Path

import pytest

from gptforge import load


@pytest.fixture
def space(run, program, tmp_path) -> Path:
    done = program("export", run, "--to", "space", "space")
    assert (done.code, done.out) == (0, ""), done.err
    return tmp_path / "space"


def test_a_space_is_complete_and_a_run_folder(space, run) -> None:
    card = (space / "README.md").read_text(encoding="utf-8")
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert (front["sdk"], front["app_port"]) == ("docker", "7860")
    assert front["title"] == '"run"'
    assert "license" not in front
    # The title is the name of the run, wherever the folder is.
    assert "title='run'" in (space / "app.py").read_text(encoding="utf-8")
    assert '"app.py"' in (space / "Dockerfile").read_text(encoding="utf-8")
    assert "bits per byte" in card
    # The text has no c.
    assert "Once" not in card
    assert "input.txt" not in {path.name for path in space.rglob("*")}
    original, copy = load(run, device="cpu"), load(space, device="cpu")
    assert copy.generate("ROMEO:", 20, seed=1) == original.generate("ROMEO:", 20, seed=1)
    # Uploads lose symbolic links.
    for link in ("best", "last"):
        (space / "checkpoints" / link).unlink()
    assert load(space, device="cpu").generate("ROMEO:", 20, seed=1)


def test_a_title_may_contain_any_word(run, program, tmp_path, monkeypatch) -> None:
    Path(run).rename(tmp_path / "PROMPTS 'TITLE'")
    assert program("export", "PROMPTS 'TITLE'", "--to", "space", "space").code == 0
    titles: list[str] = []
    monkeypatch.setattr(
        "gptforge.demo.launch.launch", lambda run, **options: titles.append(options["title"])
    )
    runpy.run_path("space/app.py", run_name="__main__")
    assert titles == ["PROMPTS 'TITLE'"]


@pytest.mark.parametrize(
    ("space_id", "host", "allowed_hosts", "port"),
    [(None, "127.0.0.1", [], 0), ("somebody/something", "0.0.0.0", ["*"], 7860)],
)
def test_only_on_spaces_others_can_connect(
    space, monkeypatch, space_id, host, allowed_hosts, port
) -> None:
    calls: list[dict] = []
    monkeypatch.setattr("gptforge.demo.launch.launch", lambda run, **options: calls.append(options))
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space_id:
        monkeypatch.setenv("SPACE_ID", space_id)
    runpy.run_path(str(space / "app.py"), run_name="__main__")
    assert (calls[0]["host"], calls[0]["allowed_hosts"]) == (host, allowed_hosts)
    assert calls[0]["port"] == port  # elsewhere, another page may have 7860
    # From the training text, which the Space does not have.
    assert calls[0]["prompts"] == ["JULIET:\n", "ROMEO:\n"]


@pytest.fixture
def other_python(tmp_path) -> Path:
    """The Python of a virtual environment with our packages, but without gptforge."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
    python = python_of(tmp_path / "venv")
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    specs = [importlib.util.find_spec(name) for name in ("torch", "tyro", "uvicorn")]
    folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
    Path(found.stdout.strip(), "others.pth").write_text("\n".join(folders))
    return python


def python_of(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def clean_environment() -> dict[str, str]:
    """Without PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def serve_and_complete(python: Path, space: Path) -> None:
    """Start the app, fetch its page and request a completion."""
    code = (
        "import gptforge; from pathlib import Path; import app\n"
        "assert Path(gptforge.__file__).parent.parent == Path.cwd(), gptforge.__file__\n"
        "app.launch('.', host='127.0.0.1', device='cpu')\n"
    )
    process = subprocess.Popen(
        [python, "-c", code], cwd=space, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=clean_environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert address, first + process.stdout.read()
        with urllib.request.urlopen(address[0], timeout=120) as page:
            assert "<title>GPT-Forge</title>" in page.read().decode()
        body = json.dumps({"prompt": "ROMEO:", "max_tokens": 20, "seed": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address[0]}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 20
    finally:
        process.terminate()
        process.communicate(timeout=120)


def test_a_space_runs_without_gptforge(space, other_python) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    serve_and_complete(other_python, space)


@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    "GPTFORGE_FRESH" not in os.environ, reason="GPTFORGE_FRESH=1 installs all packages"
)
def test_a_space_runs_with_its_requirements(space, tmp_path) -> None:
    # Takes minutes and a package index; torch in the installed version.
    venv.create(tmp_path / "fresh", with_pip=True)
    python = python_of(tmp_path / "fresh")
    torch = importlib.metadata.version("torch").split("+")[0]
    for packages in ([f"torch=={torch}"], ["-r", str(space / "requirements.txt")]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    serve_and_complete(python, space)
