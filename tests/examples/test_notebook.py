"""The example notebooks, run from the first cell to the last in a fresh folder."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.environment import python_path

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
traitlets = pytest.importorskip("traitlets.config", reason="traitlets is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

# The notebooks show curves, but not report.html, which takes longer.
BLANK_REPORT = """
from gptforge.report import html_report
from tests.pictures import blank_report
html_report.render_report = blank_report
"""
EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def execute(tmp_path, monkeypatch):
    # The kernel is another process: it finds the package by itself, wherever it is installed.
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(BLANK_REPORT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GPTFORGE_RUN", raising=False)
    text = EXAMPLES.with_name("input.txt").read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text(text[:60_000], encoding="utf-8")

    def run(name: str):
        """The code cells of a notebook, with their outputs."""
        notebook = nbformat.read(EXAMPLES / name, as_version=4)
        nbformat.validate(notebook)
        # Sockets with names: ports that are free now may be taken once the kernel has started.
        with TemporaryDirectory() as sockets:  # of a short path, as names have a limit
            options = {} if os.name == "nt" else {"transport": "ipc", "ip": f"{sockets}/kernel"}
            nbclient.NotebookClient(
                notebook,
                timeout=200,
                startup_timeout=200,
                resources={"metadata": {"path": str(tmp_path)}},
                config=traitlets.Config(KernelManager=options),
            ).execute()
        return code_cells(notebook)

    return run


def printed(cell) -> str:
    return "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")


def data(cell, kind: str) -> list[str]:
    return [out["data"][kind] for out in cell.outputs if kind in out.get("data", {})]


def test_the_training_notebook_shows_curves_and_resumes(execute) -> None:
    _, train, run, best, text, evals, plot, resume, mistake, again = execute("train.ipynb")
    (live,) = data(train, "text/html")
    assert "data:image/png;base64," in live
    assert "Best held-out loss" in live
    assert "step 12 |" not in printed(train)
    assert data(run, "text/html")[0].count("<tr>") == 3
    assert data(best, "text/plain")[0].startswith("Best(step=")
    assert len(printed(text)) > 100
    assert [step for step, _ in eval(data(evals, "text/plain")[0])] == [20, 40, 60]
    assert data(plot, "image/png")
    assert data(resume, "text/plain")[-1] == "20"
    assert "saved runs/train/checkpoints/step-000080" in printed(resume)
    assert "\nmin_lr 0.01 is more than max_lr 0.001\n" in printed(mistake)
    assert "step 80 of 80" in data(again, "text/plain")[0]


def test_the_writing_notebook_fine_tunes_and_generates(execute) -> None:
    _, _, tune, _, generate, stream, batch, probabilities, loss = execute("write.ipynb")
    assert "step 30 of 30" in data(tune, "text/plain")[-1]
    assert printed(generate).startswith("ROMEO:")
    assert len(printed(generate)) == len("ROMEO:") + 200 + 1
    assert len(printed(stream)) == 100
    assert printed(batch).count("finish_reason:") == 3
    assert len(printed(probabilities).splitlines()) == 12
    assert "nats per token" in data(loss, "text/plain")[-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebooks_are_committed_without_output(path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    assert not any(cell.outputs or cell.execution_count for cell in cells)
