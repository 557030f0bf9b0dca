"""A tiny run, faults, and the question whether the run ended as if there had been none.

Used by faults.py. Each start of the program is a process of its own. Where the system can fork, it
is forked from a server that has imported torch already: a start then costs a few hundredths of a
second, not seconds. Elsewhere the same code starts fresh processes.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from gptforge.checkpoint.store import find_corruption
from tests.faults.case import (
    EVAL_EVERY,
    KEEP,
    OUT_DIR,
    SAVE_EVERY,
    STEPS,
    Case,
    Ended,
    announced,
    culprit,
    evaluations_of,
    hashes_of,
    log_faults,
    pointers_of,
)
from tests.faults.child import ERR, OPERATIONS, OUT, Strike, run

HANGS_AFTER = 120.0
BATCHES = 6
"""About so many make one evaluation: stops are aimed at the first two."""


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run comes to."""

    hashes: dict[str, str]
    pointers: dict[str, str | None]
    evaluations: list[object]
    operations: int
    seconds: float


class Bench:
    """Starts programs, and compares what they come to with an undisturbed run.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        method = (
            "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        )
        self._context = multiprocessing.get_context(method)
        # More threads than cores make tiny models many times slower.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if method == "forkserver":
            self._context.set_forkserver_preload(["tests.faults.child"])
        self.text = folder / "play.txt"
        self.text.write_text(_play(), encoding="utf-8", newline="\n")
        self._numbers = 0
        self._halfway: Case | None = None
        self.reference = self._undisturbed()

    @property
    def args(self) -> list[str]:
        flags: dict[str, object] = {
            "preset": "debug",
            "device": "cpu",
            "compile": "false",
            # Evaluations of several batches.
            "batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": STEPS,
            "save_every": SAVE_EVERY,
            "eval_every": EVAL_EVERY,
            "keep": KEEP,
            "sample_every": 20,
            "dropout": 0.1,
            "max_lr": 0.03,
            "input": self.text,
            "out_dir": OUT_DIR,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def case(self) -> Case:
        """A place for a new run."""
        self._numbers += 1
        folder = self.folder / f"case-{self._numbers}"
        (folder / "disk").mkdir(parents=True)
        return Case(folder)

    def copy(self, case: Case) -> Case:
        """The same run once more, to be damaged in another way."""
        other = self.case()
        shutil.copytree(case.folder, other.folder, symlinks=True, dirs_exist_ok=True)
        return other

    def start(self, case: Case, *strikes: Strike, more: Sequence[str] = ()) -> BaseProcess:
        """Start the program, to be struck, with flags added; come back at once."""
        arguments = (str(case.folder), [*self.args, *more], strikes)
        process = self._context.Process(target=run, args=arguments)  # type: ignore[attr-defined]
        process.start()
        assert isinstance(process, BaseProcess)
        return process

    def wait(self, case: Case, process: BaseProcess) -> Ended:
        """Come back when the process has ended; one that hangs is killed, and complained of."""
        process.join(HANGS_AFTER)
        if process.is_alive():
            process.kill()
            process.join()
            case.complain("lost", f"hung for {HANGS_AFTER:.0f} s")
        code = process.exitcode
        assert code is not None
        said = [(case.folder / name).read_text(encoding="utf-8") for name in (OUT, ERR)]
        ended = Ended(code if code >= 0 else 128 - code, *said)
        if "Traceback" in ended.err:
            case.complain("rough", f"traceback: {culprit(ended.err)}")
        return ended

    def go(self, case: Case, *strikes: Strike, more: Sequence[str] = ()) -> Ended:
        """Start the program and wait for its end."""
        return self.wait(case, self.start(case, *strikes, more=more))

    def finish(
        self,
        case: Case,
        *,
        logs_whole: bool = True,
        torn_end_is_fine: bool = False,
        is_damaged: bool = False,
    ) -> Ended:
        """Start the same command once more, which must finish the run; then compare.

        Args:
            case: the run.
            logs_whole: whether the metrics must be those of an undisturbed run.
            torn_end_is_fine: half a line may stand at the end: a finished run is not written to.
            is_damaged: what was saved last is gone, by intent.
        """
        before, promised = case.newest(), announced(case.run)
        if before < promised and not is_damaged:
            case.complain("lost", f"step {promised} was saved, step {before} is there")
        ended = self.go(case)
        if ended.code:
            said = ended.err.strip()[-300:]
            case.complain("lost", f"does not go on from step {before}, exit {ended.code}: {said}")
            return ended
        self._check_start(case, ended, before)
        self._compare(case)
        if logs_whole:
            path = case.run / "metrics.jsonl"
            for what in log_faults(path, torn_end_is_fine=torn_end_is_fine and before == STEPS):
                case.complain("rough", what)
            if evaluations_of(case) != self.reference.evaluations:
                case.complain("differs", f"evaluations or samples: {evaluations_of(case)}")
        return ended

    def halfway(self) -> Case:
        """A run that was killed with several checkpoints behind it: the same one each time."""
        if self._halfway is None:
            case = self.case()
            # In the second half: best, last and two others are there.
            self.go(case, Strike(int(0.7 * self.reference.operations), "kill"))
            assert len(case.store.checkpoints()) > 2, "too few checkpoints"
            self._halfway = case
        return self.copy(self._halfway)

    def _compare(self, case: Case) -> None:
        """Complain of all that an undisturbed run would have left otherwise."""
        hashes, pointers = hashes_of(case), pointers_of(case)
        for name, value in self.reference.hashes.items():
            if hashes.get(name) != value:
                case.complain("differs", f"{name} of the last checkpoint")
        if pointers != self.reference.pointers:
            case.complain("lost", f"pointers {pointers}, not {self.reference.pointers}")
        for path in case.store.checkpoints():
            if reason := find_corruption(path):
                case.complain("lost", f"{path.name} was left damaged: {reason}")
        left = [
            path.relative_to(case.run).as_posix()
            for pattern in (".*partial*", "*.replaced", "step-*.old-*", "*.diverged-*")
            for path in case.run.rglob(pattern)
        ]
        if left:
            case.complain("rough", f"left behind: {', '.join(left)}")

    def _check_start(self, case: Case, ended: Ended, before: int) -> None:
        going_on = f"Resuming from step-{before:06d}: step {before} of {STEPS}"
        if before == STEPS:
            # Behind the last save only the log's end may be missing: it is made up for.
            wanted = ["is finished", going_on]
        else:
            wanted = [going_on] if before else ["Starting training..."]
        if not any(words in ended.out for words in wanted):
            case.complain("lost", f"did not say '{wanted[0]}'")

    def _undisturbed(self) -> Reference:
        case = self.case()
        # The server finds this package wherever it was started from.
        before = os.environ.get("PYTHONPATH")
        root = str(Path(__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, before)))
        try:
            first = self.go(case)
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before
        assert first.code == 0, first.err
        second = self.case()
        begin = time.perf_counter()
        self.go(second)
        seconds = time.perf_counter() - begin
        assert hashes_of(case) == hashes_of(second), "two undisturbed runs differ"
        operations = int((second.folder / OPERATIONS).read_text(encoding="utf-8"))
        assert not log_faults(case.run / "metrics.jsonl")
        pointers, evaluations = pointers_of(case), evaluations_of(case)
        return Reference(hashes_of(case), pointers, evaluations, operations, seconds)


def send(process: BaseProcess, number: signal.Signals) -> None:
    """A signal, if there is still somebody to hear it."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def can_mount() -> str | None:
    """Why no file system can be mounted here, or None."""
    if not sys.platform.startswith("linux"):
        return "tmpfs mounts are Linux's"
    return None if os.geteuid() == 0 else "mounting a file system needs root"


def _play() -> str:
    """A small text whose end, held out, is soon learned as well as it can be: best is not last."""
    learned = [
        f"{'ROMEO' if i % 2 else 'JULIET'}:\nWhat light is {i * 7 % 41} in yonder window?\n\n"
        for i in range(60)
    ]
    held_out = "".join(learned)[:330][::-1].replace("wodniw", "EJTMUO")
    return "".join(learned) + held_out
