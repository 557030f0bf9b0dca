"""report.html: complete, escaped and small."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.report import html_report, metrics
from gptforge.report.html_report import render_report, save_report
from gptforge.report.run_info import read_run
from gptforge.report.run_report import RunReport
from tests.report.events import train_event
from tests.report.run_folders import write_run

pytest.importorskip("bokeh", reason="bokeh is not installed")
LOSSES = {10: 3.0, 20: 2.0, 30: 2.1}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"


@pytest.fixture(autouse=True)
def blank_pictures() -> None:
    """Not here: they are what is tested."""


class Page(HTMLParser):
    """Text and tags of a page; what loads something from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data) -> None:
        if self.tags[-1:] not in (["script"], ["style"]):
            self.texts.append(data)


@pytest.fixture
def without_bokeh(monkeypatch) -> None:
    monkeypatch.setattr(html_report, "has_bokeh", lambda: False)


def test_a_report_has_all_sections(tmp_path) -> None:
    folder = write_run(tmp_path / "run", LOSSES, preset="debug", dropout=0.25)
    (folder / "samples.md").write_text(
        "# Samples: x\n\n## After 1 steps\n\n~~~text\nzz\n~~~\n\n## After 20 steps\n\n"
        "~~~~text\nTo be,\n~~~ or not\n~~~~\n",
        "utf-8",
    )
    page = Page(render_report(read_run(folder)))
    for part in (
        "debug on play.txt",
        "complete",
        "Best held-out loss 2.0000 nats per token, perplexity 7.39",
        "Best held-out loss 2.0000 nats per token, 1.0000 bits per byte, at step 20 of 500",
        "loss, nats per token",
        "gradient norm, before clipping",
        "dropout 0.25 0.0",
        "python gpt.py --preset debug",
        "device cpu",
        "torch 2.13.0",
        "ended at step 30: finished",
        "After 1 steps zz",
        "After 20 steps To be, ~~~ or not",
    ):
        assert part in page.text, part
    assert page.links == []


def test_all_text_of_a_run_is_escaped(tmp_path, without_bokeh) -> None:
    folder = write_run(tmp_path / "run", LOSSES, input=HOSTILE, tokenizer=HOSTILE, init_from="<b>")
    (folder / "samples.md").write_text(
        f"## After {10**9} steps\n\n~~~text\n{HOSTILE}\n~~~\n", "utf-8"
    )
    hostile = {"kind": HOSTILE, "step": HOSTILE, "time": HOSTILE, "loss": HOSTILE}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "anomaly", **hostile}) + "\n")
        file.write(json.dumps({"event": "resume", "step": [HOSTILE], "time": 1e300}) + "\n")
    text = (folder / "config.toml").read_text("utf-8")
    (folder / "config.toml").write_text(text + f"note = {json.dumps(HOSTILE)}\n", "utf-8")
    html = render_report(read_run(folder))
    page = Page(html)
    assert "script" not in page.tags and "img" not in page.tags
    assert "</script><script>alert(1)" in page.text
    assert "\x1b" not in html
    assert "default-src 'none'" in html


def test_a_long_run_is_thinned_out(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {100_000: 2.0})
    assert len(metrics.read_history(folder / "metrics.jsonl").train) > 8000
    path = save_report(folder)
    assert path == folder / "report.html"
    assert 1e6 < path.stat().st_size < 2.5e6


def test_commands_are_those_of_the_program_that_trained(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {100: 2.0})
    html = save_report(folder, program="my-gptforge").read_text("utf-8")
    assert "my-gptforge sample" in Page(html).text


@pytest.mark.parametrize("losses", [{}, {1: 2.0}])
def test_short_runs_have_a_report(tmp_path, losses) -> None:
    folder = write_run(tmp_path / "run", losses)
    assert "Curves" in Page(save_report(folder).read_text("utf-8")).text
    (folder / "metrics.jsonl").unlink()
    assert "No step was logged" in render_report(read_run(folder))


def test_without_bokeh_the_curves_are_a_picture(tmp_path, without_bokeh) -> None:
    folder = write_run(tmp_path / "run", {5000: 2.0})
    html = save_report(folder).read_text("utf-8")
    page = Page(html)
    assert page.tags.count("svg") == 1 and "script" not in page.tags
    assert "var(--text)" in html and "#22262e" not in html
    assert "install Bokeh (pip install -e '.[report]'" in page.text
    assert len(html) < 300_000
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_samples_are_spread_over_the_run(tmp_path) -> None:
    samples = "".join(
        f"\n## After {n} steps\n\n~~~text\n{n}\n~~~\n" for n in range(100, 10_000, 100)
    )
    folder = write_run(tmp_path / "run", {})
    (folder / "samples.md").write_text(samples, "utf-8")
    html = render_report(read_run(folder))
    steps = [int(step.replace(",", "")) for step in re.findall(r">After ([\d,]+) steps<", html)]
    assert 9 <= len(steps) <= 12 and steps[-1] == 9900
    assert len({b - a for a, b in pairwise(steps)}) == 1


def test_training_ends_with_a_report(tmp_path, messages) -> None:
    folder = write_run(tmp_path / "run", {}, reason=None)
    report = RunReport(Config(out_dir=str(folder), max_steps=9), title="t")
    report.log_step(train_event(1))
    report.finish("interrupted", step=2, epochs=0.1, seconds=2, has_val=False)
    assert messages[-1].endswith(f"Report: {(folder / 'report.html').as_posix()}")
    assert "stopped" in (folder / "report.html").read_text("utf-8")


def test_a_report_that_fails_does_not_end_the_run(tmp_path, monkeypatch, messages) -> None:
    folder = write_run(tmp_path / "run", {}, reason=None)

    def fail(*_: object) -> None:
        raise RuntimeError("no page here")

    monkeypatch.setattr(html_report, "render_report", fail)
    report = RunReport(Config(out_dir=str(folder), max_steps=9), title="t")
    report.finish("finished", step=1, epochs=0.1, seconds=2, has_val=False)
    assert "no report was written (no page here)" in "\n".join(messages)
    assert "Report:" not in messages[-1]
    assert '"end"' in (folder / "metrics.jsonl").read_text()
    assert not Path(folder / "report.html").exists()


def test_a_folder_without_a_run_has_no_report(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no config\.toml"):
        save_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
