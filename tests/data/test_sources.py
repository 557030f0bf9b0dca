"""Which files a name stands for."""

from pathlib import Path

import pytest

from gptforge.data.sources import find_sources
from gptforge.errors import UserError


def test_what_programs_keep_in_a_folder_of_texts_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = ("a.txt", "b.text", "c/d.markdown", "c/e.ndjson", "checkpoints/f.MD")
    strange = ("package.json", "c/index.json", ".git/g.txt", "runs/x/log.md", "runs/x/config.toml",
               "runs/x/metrics.jsonl", "runs/x/checkpoints/last/config.json")  # fmt: skip
    for name in (*kept, *strange):
        path = Path("texts", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert [source.name for source in find_sources(["texts"])] == [f"texts/{name}" for name in kept]


def test_a_json_that_is_named_is_taken_at_its_word(tmp_path) -> None:
    (tmp_path / "a.json").touch()
    for name in (tmp_path / "a.json", tmp_path / "*.json"):
        assert [source.kind for source in find_sources([str(name)])] == ["jsonl"]


@pytest.mark.parametrize(
    ("files", "name", "words"),
    [
        (["run/config.toml", "run/checkpoints/last"], "run", "--init_from run begins with"),
        (["m/config.json", "m/model.safetensors", "m/README.md"], "m", "--init_from m begins with"),
        ([], "https://example.com/text.txt", "addresses are not read"),
    ],
)
def test_what_is_no_text_is_told_apart(tmp_path, monkeypatch, files, name, words) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    with pytest.raises(UserError, match=words):
        find_sources([name])
