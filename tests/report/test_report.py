import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from gptforge.config import GPTConfig
from gptforge.model import GPT
from gptforge.report import metrics
from gptforge.report.format import format_duration
from gptforge.report.metrics import History, read_history, step_line
from gptforge.report.run_report import RunReport
from gptforge.report.summary import model_summary
from gptforge.report.verdict import verdict

GOLDEN = Path(__file__).parents[1] / "golden"


def event(step: int, loss: float = 2.0) -> dict[str, float]:
    return {"step": step, "loss": loss, "dt_ms": 5.0, "tok_per_sec": 1e4, "norm": 1.0, "lr": 1e-3,
            "epoch": 0.1 * step}  # fmt: skip


def judged(*pairs: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": s, "val_loss": x, "val_bpb": x / 2, "epoch": s / 100} for s, x in pairs]


def test_the_summary_is_the_seeds_to_the_letter() -> None:
    shape = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    expected = (GOLDEN / "summary-gpt2.txt").read_text(encoding="utf-8")
    assert model_summary(GPT(shape)) + "\n" == expected


def test_the_summary_of_one_block_counts_one() -> None:
    lines = model_summary(GPT(GPTConfig(8, 16, 1, 1, 4))).splitlines()
    assert "      (0): Block(" in lines
    assert "      └─Block 0: (244 parameters)" in lines


def test_a_step_line_is_the_seeds() -> None:
    line = step_line(
        {"step": 10, "loss": 8.61173, "dt_ms": 19315.149, "tok_per_sec": 6785.971, "norm": 2.9288,
         "lr": 1.1e-4}
    )  # fmt: skip
    assert line == (
        "step 10 | loss: 8.6117 | dt: 19315.15ms | tok/sec: 6785.97 | norm: 2.93 | lr: 0.000110"
    )


@pytest.mark.parametrize(
    ("evals", "words"),
    [
        (judged((50, 5.0), (100, 4.0), (150, 3.0)), "still getting better"),
        (judged((50, 5.0), (100, 4.0), (150, 3.999)), "all but stopped"),
        (judged((50, 5.0), (100, 4.0), (150, 7.0)), "it may come and go"),
        (judged((50, 5.0), (100, 4.0), (150, 4.01), (200, 4.0)), "stayed level"),
        (judged((50, 5.0), (120, 4.0), (150, 4.01)), "In the 30 steps after that it stood level"),
        (judged((50, 5.0), (100, 4.0), (150, 4.01)), "stayed level"),
        (judged((50, 5.0)), "judged only once"),
        # Each step is small at the end of a cosine; together they are not.
        (judged(*((i, 3 - i / 200 + (i / 200) ** 2 / 4) for i in range(50, 400, 50))), "getting"),
    ],
)
def test_the_verdict_tells_what_the_curve_shows(evals, words) -> None:
    history = History(train=[event(149, 0.05)], evals=evals)
    text = verdict(history, total_steps=150, epochs=3, out_dir="runs/x", has_val=True)
    assert words in text
    best = min(e["val_loss"] for e in evals)
    assert f"{best:.4f}" in text
    assert "python gpt.py sample runs/x" in text


@pytest.mark.parametrize(
    ("evals", "words"),
    [
        # Stopped by hand ten steps behind a judgement: in ten steps nothing gets much better.
        (judged((250, 5.0), (260, 4.99)), "too late to tell"),
        (judged((250, 5.0), (260, 4.0)), "too late to tell"),
        (judged((500, 4.0), (800, 3.0), (1000, 2.9)), "still getting better"),
        (judged((100, 4.0), (900, 2.0), (1000, 1.999)), "judged too seldom"),
        (judged((100, 2.0), (900, 2.0), (1000, 1.999)), "all but stopped"),
        (judged((250, 4.0), (255, 4.001), (260, 4.002)), "is not known"),
        # Judged ever more densely: what counts is how long ago, not how many judgements.
        (judged((10, 5.0), (20, 3.0), (28, 2.01), (29, 2.005), (30, 2.0)), "still getting better"),
    ],
)
def test_the_verdict_goes_by_steps_however_they_were_judged(evals, words) -> None:
    end = int(evals[-1]["step"])
    history = History(train=[event(end - 1)], evals=evals)
    assert words in verdict(history, total_steps=end, epochs=1, out_dir="r", has_val=True)


@pytest.mark.parametrize(
    ("losses", "epochs", "words"),
    [
        ((5.0, 3.9, 0.5), 14, "by heart"),
        # What was never read twice is not known by heart.
        ((5.0, 3.9, 3.5), 0.4, "it may come and go"),
        ((5.0, 3.9, 6.5), 14, "a smaller --max_lr may help"),
        ((5.0, 3.9, 7.5), 0.4, "a smaller --max_lr may help"),
        # Known no better than before, however often it was read.
        ((5.0, 3.9, 3.9), 14, "it may come and go"),
    ],
)
def test_the_verdict_says_by_heart_only_where_the_text_was_learned_better(
    losses, epochs, words
) -> None:
    evals = judged((50, 5.0), (100, 4.0), (150, 7.0))
    evals[-1]["epoch"] = epochs
    train = [event(50 * i + j, loss) for i, loss in enumerate(losses) for j in range(30, 50)]
    text = verdict(
        History(train=train, evals=evals), total_steps=150, epochs=epochs, out_dir="r",
        has_val=True,
    )  # fmt: skip
    assert "After that it got worse, 7.0000" in text and words in text
    assert "The best" in text


def test_the_verdict_does_not_praise_what_was_never_judged() -> None:
    text = verdict(
        History(train=[event(9, 0.005)]), total_steps=10, epochs=60, out_dir="r", has_val=False
    )
    assert "Nothing was held out" in text


def test_the_verdict_of_a_run_that_stopped_early_does_not_say_nothing_was_held_out() -> None:
    history = History(train=[event(9)])
    text = verdict(history, total_steps=10, epochs=1, out_dir="r", has_val=True)
    assert "not judged yet" in text
    assert "Nothing was held out" not in text


def test_a_picture_that_cannot_be_drawn_is_no_reason_to_stop(tmp_path, monkeypatch, capsys) -> None:
    report = RunReport(tmp_path, title=r"a$\frac$.txt")
    report.plot(force=True)
    assert (tmp_path / "training_curves.png").is_file()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr("gptforge.report.run_report.draw_curves", fail)
    for _ in range(2):
        report.plot(force=True)
    report.finish("finished", step=1, epochs=0.1, seconds=2, has_val=False)
    said = capsys.readouterr().out
    assert said.count("no fonts here") == 1
    assert "Curves:" not in said
    monkeypatch.undo()
    report.plot(force=True)
    report.finish("finished", step=1, epochs=0.1, seconds=2, has_val=False)
    assert "Curves: " in capsys.readouterr().out


def test_going_on_cuts_the_files_back_to_the_checkpoint(tmp_path, capsys) -> None:
    report = RunReport(tmp_path, title="t")
    report.start("SUMMARY", command="c", facts={})
    report.log_step(event(0))
    sizes = report.file_sizes()
    kept = {name: (tmp_path / name).read_bytes() for name in sizes}
    report.log_step(event(1))
    report.log_sample(2, "words", is_last=False)
    report.resume(1, sizes, checkpoint="step-000001", is_best=True, command="c")
    assert (tmp_path / "log.md").read_bytes() == kept["log.md"]
    assert (tmp_path / "samples.md").read_bytes() == kept["samples.md"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "train", "save", "resume"]


def test_the_log_is_markdown_whose_fence_closes(tmp_path, capsys) -> None:
    report = RunReport(tmp_path, title="t")
    report.start("SUMMARY", command="c", facts={})
    report.log_step(event(0))
    report.log_sample(1, "~~~ not a fence", is_last=True)
    report.finish("finished", step=1, epochs=0.1, seconds=2, has_val=False)
    assert (tmp_path / "log.md").read_text().count("```") == 2
    assert "~~~~text" in (tmp_path / "samples.md").read_text()


def test_a_broken_line_in_the_metrics_is_passed_over(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"event": "train", "step": 0}\n{"event": "tra\n\n[]\n{"event": "eval", "step": 1}\n'
    )
    history = read_history(path)
    assert (len(history.train), len(history.evals)) == (1, 1)


@pytest.mark.parametrize("count", [0, 1, 16, 17, 18, 31, 32, 33, 34, 100, 1000, 1025])
def test_of_many_train_events_an_even_selection_is_read(tmp_path, monkeypatch, count) -> None:
    monkeypatch.setattr("gptforge.report.metrics.MAX_TRAIN", 16)
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(count):
            file.write(json.dumps(event(step) | {"event": "train"}) + "\n")
            if step % 10 == 9:
                file.write(json.dumps({"event": "eval", "step": step + 1}) + "\n")
    history = read_history(path)
    steps = [line["step"] for line in history.train]
    assert len(history.evals) == count // 10
    if count <= 16:
        assert steps == list(range(count))
        return
    assert 8 <= len(steps) <= 17
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert len({b - a for a, b in pairwise(steps[:-1])}) == 1
    assert steps[-1] - steps[-2] <= steps[1]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 second"), (40, "40 seconds"), (240, "4 minutes"), (3 * 3600, "3.0 hours"),
     (12 * 86400, "12 days")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, words) -> None:
    assert format_duration(seconds) == words


def test_a_history_is_read_of_a_file_alone_and_of_its_end(tmp_path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) + "\n" for step in range(100)]
    path.write_text("".join(lines) + "x" * 10**6 + "\n" + lines[0])
    assert len(read_history(path).train) == 101
    monkeypatch.setattr(metrics, "MAX_BYTES", 10**6 + 2 * len(lines[0]))
    assert [event["step"] for event in read_history(path).train] == [0]
    if os.name != "nt":
        (tmp_path / "link").symlink_to(path)
        os.mkfifo(tmp_path / "pipe")
        for odd in ("link", "pipe", "nowhere"):
            assert not read_history(tmp_path / odd).train
