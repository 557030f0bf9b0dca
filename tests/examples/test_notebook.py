"""The example notebook, run from its first cell to its last in a fresh folder."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "write.ipynb"


def test_the_notebook_runs_in_an_empty_folder(tmp_path, monkeypatch) -> None:
    # The kernel is another process: it finds the package by itself, wherever it is installed.
    path = os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path.rstrip(os.pathsep))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GPTFORGE_RUN", raising=False)
    text = NOTEBOOK.parents[1].joinpath("input.txt").read_text(encoding="utf-8")
    (tmp_path / "input.txt").write_text(text[:300_000], encoding="utf-8")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    def shown(cell) -> str:
        return "".join(out.get("text", "") for out in cell.outputs if out.get("name") == "stdout")

    assert shown(cells[2]).startswith("ROMEO:")
    assert len(shown(cells[2])) == len("ROMEO:") + 200 + 1
    assert len(shown(cells[3])) == 100
    assert shown(cells[4]).count("finish_reason:") == 3
    assert len(shown(cells[5]).splitlines()) == 12
    assert "nats per token" in cells[6].outputs[-1]["data"]["text/plain"]


def test_the_notebook_is_committed_without_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
