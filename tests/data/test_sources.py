"""Which files a name stands for."""

from pathlib import Path

from gptforge.data.sources import find_sources


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
