"""Training from Python: `gptforge.train` and `gptforge.Run`."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import gptforge
from gptforge.api.console import as_arguments
from gptforge.config import FIELDS
from gptforge.report import run_report
from gptforge.training.trainer import Trainer
from tests.conftest import play_text
from tests.environment import python_path
from tests.programs import events

DEBUG = {"preset": "debug", "device": "cpu", "out_dir": "run"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Drawing takes longer than training here.
    monkeypatch.setattr(run_report, "save_curves", lambda *args, **options: None)


def test_a_run_has_metrics_the_best_checkpoint_curves_and_a_model(play) -> None:
    run = gptforge.train(**DEBUG, input=play)
    assert run.path == Path("run")
    assert run.metrics == events(Path("run"))
    scores = {e["step"]: e["val_loss"] for e in run.metrics if e["event"] == "eval"}
    step, loss, path = run.best
    assert scores[step] == pytest.approx(loss, rel=1e-9) == min(scores.values())
    assert path.samefile("run/checkpoints/best")
    assert run.config.max_steps == 20
    assert isinstance(run.model.generate("ROMEO", max_new_tokens=5), str)
    assert repr(run) == f"Run(run, step 20 of 20, loss {loss:.4f} nats per token at step {step})"
    assert repr(gptforge.train(**DEBUG, input=play)) == repr(run)
    assert run.plot().axes[0].lines
    assert run._repr_html_().count("<tr>") == 3
    assert "data:image/png;base64," in run._repr_html_()


def test_a_tilde_is_the_home_folder(play, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    run = gptforge.train(**DEBUG | {"out_dir": "~/run"}, input=play, max_steps=1)
    assert run.path == gptforge.Run("~/run").path == tmp_path / "home/run"
    assert gptforge.load("~/run").tokenizer.vocab_size == run.model.tokenizer.vocab_size


def test_settings_of_torch_change_no_loss_and_are_kept(play) -> None:
    loss = gptforge.train(**DEBUG, input=play, max_steps=2).best.loss
    precision = torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            other = {"out_dir": "other", "deterministic": True}
            run = gptforge.train(**DEBUG | other, input=play, max_steps=2)
        assert run.best.loss == loss
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_float32_matmul_precision() == precision
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_is_found_from_another_working_folder(play, tmp_path, monkeypatch) -> None:
    run = gptforge.train(**DEBUG, input=play, max_steps=1)
    best, metrics = run.best, run.metrics
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert best is not None
    assert run.best == best
    assert run.metrics == metrics
    assert run.model.generate("ROMEO", max_new_tokens=1)
    with pytest.raises(gptforge.UserError, match="is a model: give its run folder"):
        gptforge.Run(best.path)


def test_a_callback_must_be_a_function(play) -> None:
    with pytest.raises(gptforge.UserError, match="on_eval takes a function, not 3"):
        gptforge.train(**DEBUG, input=play, on_eval=3)
    assert not Path("run").exists()


def test_train_is_the_command_with_the_same_flags(play, program) -> None:
    gptforge.train(**DEBUG, input=play)
    flags = [f"--{name}={value}" for name, value in DEBUG.items() if name != "out_dir"]
    done = program(*flags, "--out_dir", "command", "--input", play)
    assert done.code == 0, done.err

    def losses(folder: str) -> list[float]:
        return [e["loss"] for e in events(Path(folder)) if e["event"] == "train"]

    assert losses("run") == losses("command")
    # The command in its config.toml finds the run finished.
    command = events(Path("run"))[0]["command"].split()
    assert "is finished" in program(*command[1:]).out


def test_callbacks_get_the_events_of_the_metrics(play) -> None:
    steps, evals, saves = [], [], []
    run = gptforge.train(
        **DEBUG, input=play, on_step=steps.append, on_eval=evals.append, on_save=saves.append
    )
    by_kind = {k: [e for e in run.metrics if e["event"] == k] for k in ("train", "eval", "save")}
    assert steps == by_kind["train"]
    assert evals == by_kind["eval"]
    assert saves == [run.path / "checkpoints" / e["checkpoint"] for e in by_kind["save"]]
    assert len(steps) == 20
    assert len(evals) == 2


def test_a_callback_may_change_the_working_folder(play, tmp_path, capsys) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    saves: list[Path] = []

    def leave(event: dict) -> None:
        os.chdir(elsewhere)

    run = gptforge.train(**DEBUG, input=play, on_step=leave, on_save=saves.append)
    assert run.metrics[-1]["reason"] == "finished"
    assert run.path == tmp_path / "run"
    assert not list(elsewhere.iterdir())
    assert saves[-1].is_dir()
    assert f"sample {tmp_path}/run" in capsys.readouterr().out
    assert not (tmp_path / "run/.lock").exists()


def test_an_error_in_a_callback_is_raised_once_the_state_is_saved(play) -> None:
    def fail(event: dict) -> None:
        if event["step"] == 3:
            raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"):
        gptforge.train(**DEBUG, input=play, on_step=fail)
    assert Path("run/checkpoints/last").resolve().name == "step-000004"
    assert "Stopped by ZeroDivisionError in a callback at step 4" in Path("run/log.md").read_text()
    # The folder is unlocked, and the same call resumes.
    run = gptforge.train(**DEBUG, input=play)
    assert [e["step"] for e in run.metrics if e["event"] == "train"] == list(range(20))


def test_an_interrupt_is_raised_after_saving_with_the_call_that_resumes(play, capsys) -> None:
    handler = signal.getsignal(signal.SIGINT)
    interrupt = lambda event: event["step"] == 3 and signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt) as error:
        gptforge.train(**DEBUG, input=play, on_step=interrupt, restart=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert Path("run/checkpoints/step-000004").is_dir()
    # The first evaluation, after 10 steps, was not reached.
    stopped = gptforge.Run("run")
    assert stopped.best is not None
    assert stopped.best.step == stopped.metrics[-1]["best_step"] == 4
    assert stopped.best.loss == stopped.metrics[-1]["final_val_loss"]
    call = str(error.value).partition("resume with ")[2]
    run = eval(call, {"gptforge": gptforge})
    assert run.metrics[-1]["reason"] == "finished"
    assert "Resuming from step-000004" in capsys.readouterr().out


def test_a_second_interrupt_ends_the_call_and_not_the_process(play) -> None:
    def interrupt_twice(event: dict) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        gptforge.train(**DEBUG, input=play, on_step=interrupt_twice)
    assert gptforge.train(**DEBUG, input=play).metrics[-1]["reason"] == "finished"


def test_a_second_interrupt_while_a_teacher_trains(play, monkeypatch) -> None:
    train_step = Trainer.train_step

    def interrupt_twice(trainer: Trainer) -> object:
        assert trainer.report.is_teacher
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return train_step(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", interrupt_twice)
        gptforge.train(**DEBUG, input=play, teachers=1)
    # The teacher's folder is unlocked, and only the steps of the run itself are reported.
    steps: list[int] = []
    fields = {**DEBUG, "input": play, "teachers": 1}
    run = gptforge.train(**fields, on_step=lambda event: steps.append(event["step"]))
    assert run.metrics[-1]["reason"] == "finished"
    assert steps == [event["step"] for event in run.metrics if event["event"] == "train"]


def test_sigterm_saves_and_exits_with_its_code(play) -> None:
    terminate = lambda event: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with pytest.raises(SystemExit) as exit_:
        gptforge.train(**DEBUG, input=play, on_step=terminate)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert Path("run/checkpoints/step-000001").is_dir()


def test_a_time_limit_in_the_training_of_a_teacher_is_an_error(play) -> None:
    limit = {"max_steps": 10**5, "time_limit": 0.01, "teachers": 1}
    with pytest.raises(gptforge.RunError, match=r"a teacher trained; resume with .*teachers=1"):
        gptforge.train(**DEBUG, input=play, **limit)
    assert Path("run/teachers/teacher-1/checkpoints/last").exists()


def test_a_thread_trains_without_signal_handlers(play) -> None:
    runs = []
    thread = threading.Thread(target=lambda: runs.append(gptforge.train(**DEBUG, input=play)))
    thread.start()
    thread.join()
    assert runs[0].metrics[-1]["reason"] == "finished"


def test_a_long_text_of_one_line() -> None:
    text = "To be, or not to be. " * 500
    run = gptforge.train(**DEBUG, text=text, max_steps=1)
    assert Path(run.config.input).read_text(encoding="utf-8") == text


def test_a_text_is_stored_under_its_content_so_that_the_run_resumes() -> None:
    first = gptforge.train(**DEBUG, text=play_text(), max_steps=5, warmup_steps=1)
    assert Path(first.config.input).read_text("utf-8") == play_text()
    second = gptforge.train(**DEBUG, text=play_text(), max_steps=8, warmup_steps=1)
    assert second.config.input == first.config.input
    assert [e["step"] for e in second.metrics if e["event"] == "train"] == list(range(8))


def test_documents_may_be_strings_or_rows_of_a_dataset() -> None:
    texts = [f"{part}\n" for part in play_text().split("\n\n")]
    runs = [
        gptforge.train(text=(text for text in texts), **DEBUG),
        gptforge.train(text=[{"id": 1, "text": text} for text in texts], **DEBUG),
        gptforge.train(
            text=({"body": text} for text in texts), field="body", **DEBUG | {"out_dir": "b"}
        ),
    ]
    stored = [
        [json.loads(line) for line in Path(run.config.input).read_text("utf-8").splitlines()]
        for run in runs
    ]
    assert stored[0] == stored[1] == [{"text": text} for text in texts]
    assert stored[2] == [{"body": text} for text in texts]
    losses = [[e.get("loss") for e in run.metrics if e["event"] == "train"] for run in runs]
    assert losses[0] == losses[2]


def test_a_dataset_of_the_hub_is_a_text() -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    if not hasattr(datasets, "Dataset"):
        pytest.skip("datasets is a stand-in of another test")
    texts = play_text().split("\n\n")
    dataset = datasets.Dataset.from_dict({"text": texts, "id": range(len(texts))})
    run = gptforge.train(text=dataset, **DEBUG)
    assert len(Path(run.config.input).read_text("utf-8").splitlines()) == len(texts)
    with pytest.raises(gptforge.UserError, match="DatasetDict of 'train': give one"):
        gptforge.train(text=datasets.DatasetDict(train=dataset), **DEBUG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_lr": -1}, "^max_lr must be above 0, not -1"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "^min_lr 1.0 is more than max_lr 0.1"),
        ({"resume": "run"}, "no field 'resume': the same call resumes a run"),
        ({"max_stps": 3}, "there is no field 'max_stps'; did you mean 'max_steps'"),
        ({"max_lr": 10**5000}, "max_lr must be below 2"),
        ({"min_lr": Fraction(1, 3)}, r"min_lr takes a number, not Fraction\(1, 3\)"),
        ({"learning_rate": 3}, "there is no field 'learning_rate'; did you mean 'max_lr'"),
        ({"overwrite": True}, "there is no field 'overwrite'; did you mean 'restart'"),
        ({"max_steps": "3"}, "max_steps takes a whole number, not '3'"),
        ({"preset": "debgu"}, "^preset debgu: unknown preset"),
        ({"config": 3}, "config takes a text, not 3"),
        ({"input": "missing.txt"}, "missing.txt"),
        ({"input": "folder/" * 1000}, "the name is longer than file systems allow"),
        ({"out_dir": "x" * 300}, "the name is longer than file systems allow"),
        ({"out_dir": "x\0y"}, r"^out_dir 'x\\x00y' has a NUL character"),
        ({"input": "To be,\nor not to be"}, "input takes a path"),
        ({"input": "To be, or not to be. " * 100}, "input takes a path"),
        ({"input": ["To be"]}, "input takes a path"),
        ({"input": "a.txt", "text": "b"}, "input and text are both set"),
        ({"text": "play.txt"}, "text is the path of a file, play.txt: give it as input"),
        ({"text": []}, "text is empty"),
        ({"text": b"bytes"}, "text takes strings"),
        ({"text": {"train": ["a"]}}, "text is a dict of 'train': give one of them"),
        ({"text": [{"body": "a"}]}, "text has no column 'text', but 'body': name one with field"),
        ({"text": ["a", None]}, "document 1 is None, not a string"),
        ({"text": "\ud800"}, "not valid text"),
    ],
)
def test_errors_name_the_argument(play, arguments, message) -> None:
    with pytest.raises(gptforge.UserError, match=message) as error:
        gptforge.train(**DEBUG | arguments)
    assert "--" not in str(error.value)
    assert not Path("run").exists()


def test_errors_in_the_arguments_of_load_name_the_argument(play) -> None:
    run = gptforge.train(**DEBUG, input=play, max_steps=1)
    for options, message in (
        ({"device": "tpu"}, "^device tpu: give auto, cpu"),
        ({"dtype": "int8"}, "^dtype int8: give auto"),
        ({"run": "x" * 300}, "the name is longer than file systems allow: use a shorter one"),
    ):
        with pytest.raises(gptforge.UserError, match=message):
            gptforge.load(**{"run": run.path} | options)


def test_values_of_other_libraries_are_accepted(play) -> None:
    numpy = pytest.importorskip("numpy")
    run = gptforge.train(
        **DEBUG, input=play, max_steps=numpy.int64(2), warmup_steps=1, max_lr=numpy.float64(0.01),
        min_lr=None, compile=False,
    )  # fmt: skip
    assert (run.config.max_steps, run.config.max_lr) == (2, 0.01)
    assert run.config.min_lr == gptforge.config.Config.min_lr


def test_messages_name_arguments_but_commands_keep_their_flags() -> None:
    message = "--max_lr 1: use --min_lr, or `gptforge prepare x --tokenizer byte` and --input x"
    expected = "max_lr 1: use min_lr, or `gptforge prepare x --tokenizer byte` and input x"
    assert as_arguments(message) == expected


def test_the_signature_has_all_fields() -> None:
    parameters = inspect.signature(gptforge.train).parameters
    assert set(parameters) == {*FIELDS, "text", "on_step", "on_eval", "on_save"}
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_folder_without_a_run_is_refused(tmp_path) -> None:
    with pytest.raises(gptforge.UserError, match="is not a run folder"):
        gptforge.Run(tmp_path)


def test_importing_the_package_is_fast_and_train_stays_a_function() -> None:
    code = (
        "import sys, gptforge\n"
        "assert set(dir(gptforge)) == {'Run', 'RunError', 'UserError', '__version__', 'load',\n"
        "                              'train'}\n"
        "assert not {'torch', 'numpy', 'tyro', 'rich'} & set(sys.modules)\n"
        "import gptforge.training.trainer\n"
        "from gptforge import train\n"
        "assert gptforge.train is train and callable(train)\n"
        "assert gptforge.load.__name__ == 'load' and gptforge.Run.__name__ == 'Run'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
