"""Commands that may take long show a bar that counts up; in a pipe they print nothing more."""

import json
from pathlib import Path

import pytest

from gptforge.report.console import ProgressMeter

COMMANDS = {
    "eval run": "evaluating",
    "eval run --data other.txt": "preparing the text",
    "eval run --tasks lambada=questions.jsonl": "lambada",
    "export run --to hf hf": "exporting",
    "export run --to space space": "exporting",
    "import hf imported": "importing",
    "prepare play.txt --out shards --tokenizer char": "preparing",
    "doctor play.txt --preset debug": "reading",
    "doctor shards": "reading tokens",
}


def test_long_commands_show_their_progress(run, play, program, monkeypatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    Path("other.txt").write_text(play.read_text() * 2)
    Path("questions.jsonl").write_text(json.dumps({"text": "what light"}))
    bars: dict[ProgressMeter, tuple[str, list[tuple[int, int]]]] = {}
    init, call = ProgressMeter.__init__, ProgressMeter.__call__

    def record_init(self, description: str) -> None:
        init(self, description)
        bars[self] = description, []

    def record_call(self, done: int, total: int, status: str = "") -> None:
        call(self, done, total, status)
        bars[self][1].append((done, total))

    monkeypatch.setattr(ProgressMeter, "__init__", record_init)
    monkeypatch.setattr(ProgressMeter, "__call__", record_call)
    for command, expected in COMMANDS.items():
        bars.clear()
        done = program(*command.split(), *(["--device", "cpu"] if "eval" in command else []))
        assert done.code == 0, done.err
        assert "\r" not in done.err + done.out and "%" not in done.err, command
        shown = {description: calls for description, calls in bars.values() if calls}
        assert expected in shown, command
        for calls in shown.values():
            counts, totals = zip(*calls, strict=True)
            assert list(counts) == sorted(counts)
            assert len(set(totals)) == 1 and 0 <= counts[-1] <= totals[0]


def test_progress_counts_bytes_of_text_not_characters(program, tmp_path, monkeypatch) -> None:
    text = "Über größere Höhen. " * 99
    Path("t.txt").write_text(text, encoding="utf-8")
    counted: list[int] = []
    monkeypatch.setattr(ProgressMeter, "add", lambda self, file, text: counted.append(text))
    for command in ("doctor t.txt --preset debug", "prepare t.txt --out shards --tokenizer char"):
        counted.clear()
        assert program(*command.split()).code == 0
        assert sum(counted) == len(text.encode()) > len(text), command
