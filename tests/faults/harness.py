"""Injects faults into a tiny run and checks that it ends as an uninterrupted one.

Each start of the program is a process of `fork_server`.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from gptforge.checkpoint.format import find_corruption
from tests.faults.case import (
    EVAL_EVERY,
    KEEP,
    OUT_DIR,
    SAVE_EVERY,
    STEPS,
    Case,
    ProcessResult,
    evaluations_of,
    hashes_of,
    latest_announced_save,
    links_of,
    log_problems,
    traceback_origin,
)
from tests.faults.child import ERR, OPERATIONS, OUT, Injection, run
from tests.fork_server import get_context

HANG_SECONDS = 120.0
BATCHES = 6
"""Approximate number per evaluation; stops are aimed at the first two evaluations."""


@dataclass(frozen=True)
class Reference:
    """Results of an uninterrupted run."""

    hashes: dict[str, str]
    links: dict[str, str | None]
    evaluations: list[object]
    operations: int
    seconds: float


class Harness:
    """Starts the program and compares its results with an uninterrupted run.

    Args:
        folder: holds all cases.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = get_context()
        self.text = folder / "play.txt"
        self.text.write_text(_play(), encoding="utf-8", newline="\n")
        self._numbers = 0
        self._halfway: Case | None = None
        self.reference = self._run_reference()

    @property
    def args(self) -> list[str]:
        flags: dict[str, object] = {
            "preset": "debug",
            "device": "cpu",
            "compile": "false",
            # Evaluations of several batches.
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "n_layer": 1,
            "max_steps": STEPS,
            "save_every": SAVE_EVERY,
            "eval_every": EVAL_EVERY,
            "keep_checkpoints": KEEP,
            "sample_every": 20,
            "dropout": 0.1,
            "max_lr": 0.03,
            "input": self.text,
            "out_dir": OUT_DIR,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def case(self) -> Case:
        """A case for a new run."""
        self._numbers += 1
        folder = self.folder / f"case-{self._numbers}"
        (folder / "disk").mkdir(parents=True)
        return Case(folder)

    def copy(self, case: Case) -> Case:
        """A copy of a run, to be corrupted in another way."""
        other = self.case()
        shutil.copytree(case.folder, other.folder, symlinks=True, dirs_exist_ok=True)
        return other

    def start(self, case: Case, *faults: Injection, more: Sequence[str] = ()) -> BaseProcess:
        """Start the program with faults and additional flags."""
        arguments = (str(case.folder), [*self.args, *more], faults)
        process = self._context.Process(target=run, args=arguments)  # type: ignore[attr-defined]
        process.start()
        assert isinstance(process, BaseProcess)
        return process

    def wait_for_start(self, case: Case, process: BaseProcess) -> None:
        """Wait until the process is about to call the program."""
        while process.is_alive() and not (case.folder / ERR).exists():
            time.sleep(0.001)

    def wait(self, case: Case, process: BaseProcess) -> ProcessResult:
        """Wait for the process; one that hangs is killed and reported."""
        process.join(HANG_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            case.report("lost", f"hung for {HANG_SECONDS:.0f} s")
        code = process.exitcode
        assert code is not None
        output = [(case.folder / name).read_text(encoding="utf-8") for name in (OUT, ERR)]
        result = ProcessResult(code if code >= 0 else 128 - code, *output)
        if "Traceback" in result.err:
            case.report("rough", f"traceback: {traceback_origin(result.err)}")
        return result

    def go(self, case: Case, *faults: Injection, more: Sequence[str] = ()) -> ProcessResult:
        """Start the program and wait for it."""
        return self.wait(case, self.start(case, *faults, more=more))

    def finish(
        self,
        case: Case,
        *,
        logs_intact: bool = True,
        is_corrupt: bool = False,
    ) -> ProcessResult:
        """Start the same command again, which must finish the run, and compare the results.

        Args:
            case: the run.
            logs_intact: whether the metrics must equal those of an uninterrupted run.
            is_corrupt: whether the latest checkpoint was corrupted on purpose.
        """
        before, promised = case.latest_step(), latest_announced_save(case.run)
        if before < promised and not is_corrupt:
            case.report("lost", f"step {promised} was saved, step {before} was found")
        result = self.go(case)
        if result.code:
            error = result.err.strip()[-300:]
            case.report("lost", f"does not resume from step {before}, exit {result.code}: {error}")
            return result
        self._check_start(case, result, before)
        self._compare(case)
        if logs_intact:
            path = case.run / "metrics.jsonl"
            for what in log_problems(path):
                case.report("rough", what)
            if evaluations_of(case) != self.reference.evaluations:
                case.report("differs", f"evaluations or samples: {evaluations_of(case)}")
        return result

    def halfway(self) -> Case:
        """A copy of a run that was killed after several checkpoints."""
        if self._halfway is None:
            case = self.case()
            # In the second half, where best, last and two others exist.
            self.go(case, Injection(int(0.7 * self.reference.operations), "kill"))
            assert len(case.store.checkpoints()) > 2, "too few checkpoints"
            self._halfway = case
        return self.copy(self._halfway)

    def _compare(self, case: Case) -> None:
        """Report all differences from an uninterrupted run."""
        hashes, links = hashes_of(case), links_of(case)
        for name, value in self.reference.hashes.items():
            if hashes.get(name) != value:
                case.report("differs", f"{name} of the last checkpoint")
        if links != self.reference.links:
            case.report("lost", f"links {links}, not {self.reference.links}")
        for path in case.store.checkpoints():
            if reason := find_corruption(path):
                case.report("lost", f"{path.name} was left damaged: {reason}")
        left = [
            path.relative_to(case.run).as_posix()
            for pattern in (".*partial*", "*.replaced", "step-*.old-*", "*.diverged-*")
            for path in case.run.rglob(pattern)
        ]
        if left:
            case.report("rough", f"left behind: {', '.join(left)}")

    def _check_start(self, case: Case, result: ProcessResult, before: int) -> None:
        resuming = f"Resuming from step-{before:06d}: step {before} of {STEPS}"
        if before == STEPS:
            # After the last save only the end of the logs may be missing, which is then written.
            expected = ["is finished", resuming]
        else:
            expected = [resuming] if before else ["Starting training..."]
        if not any(line in result.out for line in expected):
            case.report("lost", f"did not print '{expected[0]}'")

    def _run_reference(self) -> Reference:
        case = self.case()
        first = self.go(case)
        assert first.code == 0, first.err
        second = self.case()
        begin = time.perf_counter()
        self.go(second)
        seconds = time.perf_counter() - begin
        assert hashes_of(case) == hashes_of(second), "two uninterrupted runs differ"
        operations = int((second.folder / OPERATIONS).read_text(encoding="utf-8"))
        assert not log_problems(case.run / "metrics.jsonl")
        links, evaluations = links_of(case), evaluations_of(case)
        return Reference(hashes_of(case), links, evaluations, operations, seconds)


def send(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal if the process is still alive."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)


def mount_problem() -> str | None:
    """Why no file system can be mounted, or None."""
    if not sys.platform.startswith("linux"):
        return "tmpfs mounts need Linux"
    return None if os.geteuid() == 0 else "mounting a file system needs root"


def _play() -> str:
    """A text whose held-out end soon stops improving, so that best is not last."""
    train = [
        f"{'ROMEO' if i % 2 else 'JULIET'}:\nWhat light is {i * 7 % 41} in yonder window?\n\n"
        for i in range(60)
    ]
    val = "".join(train)[:330][::-1].replace("wodniw", "EJTMUO")
    return "".join(train) + val
