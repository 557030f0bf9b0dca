import json

from gptforge.checkpoint.async_saver import SavedCheckpoint
from gptforge.config import Config
from gptforge.report import run_report
from gptforge.report.format import ValLoss
from gptforge.report.run_report import RunReport
from tests.report.events import train_event


def finish(report: RunReport) -> None:
    report.finish("finished", step=1, epochs=0.1, seconds=2, has_val=False)


def test_a_plot_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, messages) -> None:
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title=r"a$\frac$.txt")
    report.plot(force=True)
    assert (tmp_path / "training_curves.png").is_file()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(run_report, "save_curves", fail)
    for _ in range(2):
        report.plot(force=True)
    finish(report)
    assert "\n".join(messages).count("no fonts here") == 1
    assert "Curves:" not in messages[-1]
    assert "![" not in (tmp_path / "log.md").read_text()
    monkeypatch.undo()
    report.plot(force=True)
    finish(report)
    assert "Curves: " in messages[-1]
    assert (tmp_path / "log.md").read_text().endswith("![Training curves](training_curves.png)\n")


def test_resume_truncates_the_files_to_the_checkpoint(tmp_path) -> None:
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title="t")
    report.start("SUMMARY", {"command": "c"})
    report.log_step(train_event(0))
    sizes = report.file_sizes()
    before = {name: (tmp_path / name).read_bytes() for name in sizes}
    report.log_step(train_event(1))
    report.log_sample(2, "words", is_last=False)
    checkpoint = SavedCheckpoint(1, "step-000001", is_best=True)
    report.resume(checkpoint, sizes, best=(1, 2.0), facts={"command": "c"})
    resumed = b"Resuming from step-000001: step 1 of 9\n"
    assert (tmp_path / "log.md").read_bytes() == before["log.md"] + resumed
    assert (tmp_path / "samples.md").read_bytes() == before["samples.md"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "train", "save", "resume"]


def test_code_fences_are_closed(tmp_path) -> None:
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title="t")
    report.start("SUMMARY", {"command": "c"})
    report.log_step(train_event(0))
    report.log_sample(1, "~~~ not a fence", is_last=True)
    finish(report)
    assert (tmp_path / "log.md").read_text().count("```") == 2
    assert "~~~~text" in (tmp_path / "samples.md").read_text()


def test_a_disabled_report_writes_and_logs_nothing(tmp_path, messages) -> None:
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title="t", enabled=False)
    report.start("SUMMARY", {"command": "c"})
    report.log_step(train_event(0))
    report.log_eval(1, ValLoss(18.0, 9, 9, 9), epoch=0.1, is_best=True)
    report.log_sample(1, "words", is_last=True)
    report.plot(force=True)
    finish(report)
    assert report.file_sizes() == {}
    assert messages == []
    assert list(tmp_path.iterdir()) == []
