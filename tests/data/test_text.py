from pathlib import Path

from gptforge.data.text import find_text


def test_the_text_in_the_working_folder_comes_before_the_packages(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ROMEO" in find_text("").read_text(encoding="utf-8").upper()
    Path("input.txt").write_text("mine")
    assert find_text("").read_text() == "mine"
    assert find_text("other.txt") == Path("other.txt")
