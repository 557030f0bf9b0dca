"""`gptforge runs`, `compare` and `report`."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.programs import ROOT
from tests.report.run_folders import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs of different ages, a damaged one and a foreign folder."""
    folder = tmp_path / "runs"
    for age, name in enumerate(("new", "middle", "sweep/old")):
        run = write_run(folder / name, {10: 3.0, 20: 2.0 + age / 10}, dropout=age / 10)
        os.utime(run / "metrics.jsonl", (1e9 - age, 1e9 - age))
    (folder / "damaged").mkdir()
    (folder / "damaged/config.toml").write_text("[[[")
    (folder / "photos").mkdir()
    return folder


def test_runs_lists_the_newest_first(program, runs) -> None:
    rows = json.loads(program("runs", "--json").out)
    found = [row["run"] for row in rows]
    order = [found.index(f"runs/{name}") for name in ("new", "middle", "sweep/old")]
    assert order == sorted(order) and len(found) == 5
    new = rows[order[0]]
    facts = {"state": "complete", "text": "play.txt", "val_loss": 2.0, "val_bpb": 1.0, "step": 20}
    assert facts.items() <= new.items()
    assert new["bytes"] > 1000 and new["seconds"] == 90.0
    table = " ".join(program("runs").out.split())
    assert "2.0000 at 20 | 20 / 500 | 2 minutes" in table
    assert "runs/damaged | damaged" in table and "not a readable TOML file" in table
    assert "runs/photos | no run" in table


def test_runs_says_how_many_tokens_a_loss_is_over_if_not_all(program, runs) -> None:
    write_run(runs / "part", {10: 3.0}, eval_tokens=512, val_tokens=512)
    write_run(runs / "all", {10: 3.0}, val_tokens=4096)
    rows = {row["run"]: row for row in json.loads(program("runs", "--json").out)}
    assert (rows["runs/part"]["val_tokens"], rows["runs/part"]["is_val_subset"]) == (512, True)
    assert (rows["runs/all"]["val_tokens"], rows["runs/all"]["is_val_subset"]) == (4096, False)
    table = program("runs").out
    assert table.count("3.0000 at 10, over 512 tokens") == 1 and "4,096" not in table


def test_an_evaluation_of_all_tokens_is_no_part(program, tmp_path) -> None:
    write_run(tmp_path / "run", {10: 3.0}, eval_tokens=600, val_tokens=300)
    [row] = json.loads(program("runs", tmp_path / "run", "--json").out)
    assert (row["val_tokens"], row["is_val_subset"]) == (300, False)


def test_runs_of_other_folders(program, runs) -> None:
    assert program("runs", "runs/new").out.count("runs/new") == 1
    assert program("runs", "runs/photos").out == "No runs in runs/photos.\n"
    done = program("runs", "missing")
    assert done.code == 2 and done.err.count("\n") == 1 and "there is no such folder" in done.err


def test_imported_models_and_runs_without_configuration_have_one_row(program, runs) -> None:
    (runs / "new/model.safetensors").touch()
    lost = runs / "sweep/old"
    checkpoint = lost / "checkpoints/step-000010"
    checkpoint.mkdir(parents=True)
    (lost / "config.toml").rename(checkpoint / "config.toml")
    rows = {row["run"]: row["state"] for row in json.loads(program("runs", "--json").out)}
    assert (rows["runs/new"], rows["runs/sweep/old"]) == ("model", "damaged") and len(rows) == 5
    notes = [line for line in program("runs").out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and not any("runs/new" in note for note in notes)
    assert any("runs/damaged/config.toml: not a readable" in note for note in notes)


def test_runs_of_a_sweep_are_its_trials(program, runs) -> None:
    trials = [write_run(Path("sweep", name), {10: 3.0}).as_posix() for name in ("a", "b")]
    Path("sweep/sweep-data").mkdir()
    Path("sweep/photos").mkdir()
    found = sorted(row["run"] for row in json.loads(program("runs", "sweep", "--json").out))
    assert found == [*trials, "sweep/photos"]


def test_compare_prints_tables_and_draws(program, runs) -> None:
    done = program("compare", "runs/new", "runs/middle", "runs/sweep/old")
    assert done.code == 0
    assert "| runs/sweep/old | 0.2" in done.out
    assert "With one seed each" in done.out
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")
    done = program("compare", "runs/new", "runs/middle", "--json", "--out", "two.svg")
    result = json.loads(done.out)
    assert result["fields"] == {"dropout": [0.0, 0.1]}
    assert [run["val_loss"] for run in result["runs"]] == [2.0, 2.1]
    assert result["differences"][0]["better"] == "runs/new"
    assert result["picture"] == "two.svg" and "<svg" in Path("two.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (("runs/new",), "two or more"),
        (("runs/new", "runs/new"), "two or more"),
        (("runs/new", "runs/photos"), "runs/photos is not a run folder"),
        (("runs/new", "runs/damaged"), "not a readable TOML file"),
        (("runs/new", "runs/middle", "--out", "x.bmp"), "must end in .png"),
        (("runs/new", "runs/middle", "--out", "no/x.png"), "there is no folder no"),
    ],
)
def test_compare_refuses_in_one_line(program, runs, args, problem) -> None:
    done = program("compare", *args)
    assert done.code == 2 and done.err.count("\n") == 1
    assert problem in done.err and not list(Path().glob("*.png"))


def test_report_writes_one_page(program, runs) -> None:
    assert program("report", "runs/new").out == "runs/new/report.html\n"
    assert Path("runs/new/report.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert program("report", "runs/new", "--out", "page.html").out == "page.html\n"
    Path("book.txt").write_text("my text")
    done = program("report", "runs/new", "--out", "book.txt")
    assert done.code == 2 and done.err == "error: --out book.txt: must end in .html\n"
    assert Path("book.txt").read_text() == "my text"
    done = program("report", "runs/photos")
    assert done.code == 2 and "no config.toml" in done.err and done.err.count("\n") == 1


def test_commands_read_runs_of_version_0_1(program, runs) -> None:
    for name in ("first", "second"):
        shutil.copytree(ROOT / "tests/golden/run-0.1", runs / name, symlinks=True)
    assert program("compare", "runs/first", "runs/second").code == 0
    assert program("report", "runs/first").code == 0
    assert "runs/first " in program("runs").out
