"""A run ended by a signal, a closed terminal or pipe, or a time limit."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.programs import DEBUG, ROOT, command, environment, events, start

if sys.platform == "linux":
    import fcntl
    import termios


@pytest.mark.skipif(os.name == "nt", reason="Windows closes streams differently")
def test_training_needs_no_output_stream(tmp_path, play) -> None:
    words = shlex.join(command(*DEBUG, "--input", play, "--out_dir", "run"))
    done = subprocess.run(
        ["sh", "-c", f"{words} >&- 2>&-"], cwd=tmp_path, env=environment(), check=False
    )
    assert done.returncode == 0
    assert events(tmp_path / "run")[-1]["reason"] == "finished"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_the_same_command_resumes(tmp_path, play, number, code) -> None:
    flags = (*DEBUG, "--input", play, "--out_dir", "run", "--max_steps", 100000)
    process = start(*flags, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 30 "):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Stopping after this step" in out
    *_, saved, resume = out.splitlines()
    assert re.fullmatch(r"Resume with: python \S*gpt\.py --resume run", resume)
    assert (tmp_path / saved.removeprefix("Saved: ") / "manifest.json").is_file()
    assert "Traceback" not in err
    end = events(tmp_path / "run")[-1]
    assert end["event"] == "end"
    assert end["reason"] == ("interrupted" if number == signal.SIGINT else "terminated")
    by = "Ctrl-C" if number == signal.SIGINT else "SIGTERM or SIGHUP"
    stopped = f"Stopped by {by} at step {end['step']} of 100000\n"
    assert stopped in (tmp_path / "run/log.md").read_text()

    process = start("--resume", "run", cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Resuming from"):
            assert int(re.search(r"step (\d+) of", line)[1]) == end["step"]
            break
    else:
        raise AssertionError("it did not resume")
    assert f"{stopped}{line}" in (tmp_path / "run/log.md").read_text()
    # One more ends the process at once, or stops the final evaluation. If it comes as late as in
    # Python's own shutdown, the process ends by the signal, for which a shell reports `code`.
    time.sleep(0.2)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(timeout=120) in (code, -number)
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' terminals hang up otherwise")
def test_closed_terminal_saves_first(tmp_path, play) -> None:
    terminal, child = os.openpty()
    process = subprocess.Popen(
        command(*DEBUG, "--input", play, "--out_dir", "run", "--max_steps", 100000),
        cwd=tmp_path, env=environment(),
        stdin=child, stdout=child, stderr=child, start_new_session=True,
        # As the controlling terminal, so that closing it sends SIGHUP.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(child)
    output = b""
    while b"step 30 " not in output:
        output += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(timeout=120) == 143
    end = events(tmp_path / "run")[-1]
    assert (end["event"], end["reason"]) == ("end", "terminated")
    last = (tmp_path / "run/checkpoints/last").resolve()
    assert last.name == f"step-{end['step']:06d}"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_closed_pipe_does_not_end_the_training(tmp_path, play) -> None:
    process = start(*DEBUG, "--input", play, "--out_dir", "run", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert events(tmp_path / "run")[-1]["event"] == "end"


def test_time_limit_saves_and_exits_0(program, play) -> None:
    done = program(
        *DEBUG, "--input", play, "--out_dir", "run", "--max_steps", 10**6, "--time_limit", 0.01
    )
    assert done.code == 0
    assert "Stopped by the time limit at step" in done.out
    assert "Resume with:" in done.out
    end = events()[-1]
    assert (end["event"], end["reason"]) == ("end", "time_limit")


WAITING_COMMAND = """
import sys, time
from gptforge import cli
def wait(args):
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
cli.COMMANDS["plan"] = (wait, object, "")
sys.exit(cli.main(["plan"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated"), ("SIGHUP", 143, "terminated")],
)
def test_signal_makes_any_command_clean_up(name, code, message) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_COMMAND], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "cleaned up\n", f"{message}\n")


IMPORTING_COMMAND = """
import os, sys, time
from gptforge import cli
def load(args):
    try:
        import careless
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
cli.COMMANDS["plan"] = (load, object, "")
sys.exit(cli.main(["plan"]))
"""
CARELESS_MODULE = """
import os, signal, time
try:
    for _ in range(2):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.2)
except BaseException:
    pass  # NumPy loses an exception in its import, too
print("imported", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("name", "code", "message"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")]
)
def test_signal_in_the_middle_of_an_import_is_obeyed_after_it(
    tmp_path, name, code, message
) -> None:
    (tmp_path / "careless.py").write_text(CARELESS_MODULE.format(name=name))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING_COMMAND], cwd=ROOT, text=True,
        capture_output=True, check=False,
        env=environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (
        code, "imported\ncleaned up\n", f"{message}\n"
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("pair", [("SIGTERM", "SIGHUP"), ("SIGHUP", "SIGTERM"), ("SIGHUP",) * 2])
def test_sighup_beside_sigterm_does_not_cut_the_cleanup_short(pair) -> None:
    command = [sys.executable, "-c", WAITING_COMMAND]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        # Stopped, so that both signals are pending when it continues.
        for name in ("SIGSTOP", *pair, "SIGCONT"):
            process.send_signal(getattr(signal, name))
        assert process.communicate(timeout=120)[0] == "cleaned up\n"
        assert process.returncode == 143


SHUTDOWN_COMMAND = """
import os, signal, sys, threading
from gptforge import cli
def interrupt(args):
    threading.Thread(target=end).start()
    raise KeyboardInterrupt
def end():
    threading.main_thread().join()  # the interpreter shuts down, and waits for this thread
    os.kill(os.getpid(), signal.SIGINT)
cli.COMMANDS["plan"] = (interrupt, object, "")
sys.argv[1:] = ["plan"]
sys.exit(cli.main())
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_ctrl_c_again_after_the_end_prints_no_traceback() -> None:
    shutdown = [sys.executable, "-c", SHUTDOWN_COMMAND]
    done = subprocess.run(shutdown, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == "interrupted\n"
    assert done.returncode == -signal.SIGINT  # a shell reports 130 for it


UNSTARTED = "no step was made and nothing is lost; the same command starts or resumes the run"
UNFINISHED = "the same command without --restart resumes what was saved"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("where", "flags", "name", "hint"),
    [
        ("resolve_run.load_dataset", (), "SIGINT", UNSTARTED),
        ("build_trainer.check_fits_memory", (), "SIGTERM", UNSTARTED),
        ("build_trainer.build_train_step", ("--restart",), "SIGINT", UNSTARTED),
        ("build_trainer.load_teachers", ("--restart", "--teachers", 1), "SIGINT", UNFINISHED),
    ],
)
def test_a_signal_before_training_says_what_to_do(
    program, play, monkeypatch, where, flags, name, hint
) -> None:
    run = (*DEBUG, "--input", play, "--max_steps", 2, "--sample_every", 0, "--out_dir", "run")
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        patch.setattr(f"gptforge.builders.{where}", lambda *_, **__: signal.raise_signal(number))
        done = program(*run, *flags)
    word = {"SIGINT": "interrupted", "SIGTERM": "terminated"}[name]
    assert (done.code, done.err) == (128 + number, f"{word}: {hint}\n")
    assert program(*run, *flags[1:]).code == 0
    assert events()[-1]["reason"] == "finished"


def test_diverged_training_is_a_failure(program, play) -> None:
    # Too few steps to give up in the middle.
    broken = (*DEBUG, "--input", play, "--max_steps", 3, "--max_lr", 1e9, "--out_dir", "run")
    done = program(*broken, "--val_fraction", 0.1)
    assert (done.code, "no finite loss: try a lower --max_lr" in done.err) == (1, True), done.err
    assert "Try it" not in done.out
    done = program("sample", "run", "--device", "cpu")
    assert (done.code, "training diverged" in done.err, done.out) == (1, True, "")
    done = program("eval", "run", "--data", play, "--json", "--device", "cpu")
    assert (done.code, "loss is NaN or Inf" in done.err, done.out) == (1, True, "")
