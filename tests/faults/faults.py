"""The faults: each function injects one kind into a run, has it finished, and returns the case.

Rounds are reproducible by the seed of the random generator.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptforge import files
from gptforge.checkpoint.format import CHECKPOINT_FILES, MANIFEST
from tests.faults.case import Case, expect_one_error_line
from tests.faults.child import BALLAST, Injection, remount
from tests.faults.harness import BATCHES, Harness, mount_problem, send

Fault = Callable[[Harness, random.Random], Case]

ALL_FILES = (*CHECKPOINT_FILES, MANIFEST)
CORRUPTIONS = ("flip", "cut", "empty", "delete")
LINK_CORRUPTIONS = ("missing", "dangling", "garbage", "folder")
FINAL = 30
"""Approximate number of changes of the disk after the last save started."""
REFUSALS = ("ENOSPC", "EIO", "EACCES", "EROFS")


def kill_at_operation(harness: Harness, rng: random.Random) -> Case:
    """Kill -9 between two changes of the disk; sometimes the restart is killed as well."""
    case = harness.case()
    for _ in range(rng.choice((1, 1, 2, 3))):
        if harness.go(case, Injection(_operation(harness, rng), "kill")).code == 0:
            break
    harness.finish(case)
    return case


def kill_in_a_write(harness: Harness, rng: random.Random) -> Case:
    """Kill -9 when half of a file's bytes are written."""
    case = harness.case()
    harness.go(case, Injection(_operation(harness, rng), "tear"))
    harness.finish(case)
    return case


def kill_any_time(harness: Harness, rng: random.Random) -> Case:
    """Kill -9 from outside, whatever the program is doing."""
    case = harness.case()
    process = harness.start(case)
    harness.wait_for_start(case, process)
    process.join(rng.uniform(0, harness.reference.seconds))
    process.kill()
    harness.wait(case, process)
    harness.finish(case)
    return case


def stop_signal(harness: Harness, rng: random.Random) -> Case:
    """SIGTERM or SIGINT, once or twice, at a change of the disk or at any moment."""
    case = harness.case()
    number = rng.choice((signal.SIGTERM, signal.SIGINT))
    times = rng.choice((1, 2))
    if rng.random() < 0.5:
        at = _operation(harness, rng)
        later = at + rng.randrange(1, 30)
        result = harness.go(case, *(Injection(n, number.name) for n in (at, later)[:times]))
    else:
        process = harness.start(case)
        harness.wait_for_start(case, process)
        process.join(rng.uniform(0, harness.reference.seconds))
        for _ in range(times):
            send(process, number)
            process.join(rng.uniform(0, 0.05))
        result = harness.wait(case, process)
    if result.code not in (0, 128 + number):
        case.report("rough", f"{number.name} x{times}: exit {result.code}")
    harness.finish(case)
    return case


def stop_in_evaluation(harness: Harness, rng: random.Random) -> Case:
    """SIGTERM, SIGINT or kill -9 during evaluations, in several sessions in a row."""
    case = harness.case()
    for _ in range(rng.randrange(1, 9)):
        action = rng.choice(("SIGTERM", "SIGTERM", "SIGINT", "kill"))
        at = rng.randrange(1, 2 * BATCHES)
        result = harness.go(case, Injection(at, action, in_evaluation=True))
        expected = signal.SIGKILL if action == "kill" else signal.Signals[action]
        if result.code not in (0, 128 + expected):
            case.report("rough", f"{action} in an evaluation: exit {result.code}")
    harness.finish(case)
    return case


def short_time_limit(harness: Harness, rng: random.Random) -> Case:
    """Sessions of a few hundredths of a second each, until the run is finished."""
    case = harness.case()
    for _ in range(100):
        limit = Injection(0, "limit", str(rng.choice((0.0, 0.05, 0.2))))
        result = harness.go(case, limit, more=("--time_limit", "0.0001"))
        if result.code:
            case.report("lost", f"a short session ends with exit {result.code}: {result.err}")
            break
        if "time limit of" not in result.out:
            break
    else:
        case.report("lost", "100 short sessions did not finish the run")
    harness.finish(case)
    return case


def disk_full(harness: Harness, rng: random.Random) -> Case:
    """A small disk fills up to the last byte; then there is room again."""
    case = harness.case()
    with _tmpfs(case, "24m"):
        result = harness.go(case, Injection(_operation(harness, rng), "fill", str(case.disk)))
        if result.code:  # the last operations need no room
            expect_one_error_line(case, result, 1)
            # Still full: the error is the same, and nothing is lost.
            expect_one_error_line(case, harness.go(case), 1)
        if rng.random() < 0.5:
            remount(str(case.disk), "size=64m")
        else:
            (case.disk / BALLAST).unlink(missing_ok=True)
        harness.finish(case)
    return case


def disk_too_small(harness: Harness, rng: random.Random) -> Case:
    """A disk has room for only a few checkpoints; then it grows."""
    case = harness.case()
    with _tmpfs(case, f"{rng.randrange(8600, 10500)}k"):
        expect_one_error_line(case, harness.go(case), 1)
        remount(str(case.disk), "size=64m")
        harness.finish(case)
    return case


def becomes_unwritable(harness: Harness, rng: random.Random) -> Case:
    """The file system turns read-only, at the start or later; then it is writable again."""
    case = harness.case()
    with _tmpfs(case, "64m"):
        if rng.random() < 0.25:
            remount(str(case.disk), "ro")
        result = harness.go(case, Injection(_operation(harness, rng), "readonly", str(case.disk)))
        if result.code:
            expect_one_error_line(case, result, 1, 2)
            expect_one_error_line(case, harness.go(case), 1, 2)
        remount(str(case.disk), "rw")
        harness.finish(case)
    return case


def refused(harness: Harness, rng: random.Random) -> Case:
    """All changes of the disk are refused from some moment on; needs no mount and no root."""
    case = harness.case()
    error = rng.choice(REFUSALS)
    result = harness.go(case, Injection(_operation(harness, rng), "refuse", error))
    if result.code:
        expect_one_error_line(case, result, 1, 2)
    harness.finish(case)
    return case


def corrupt_checkpoint(harness: Harness, rng: random.Random) -> Case:
    """A file of the latest checkpoint is changed, cut, emptied or deleted."""
    return corrupt_file(harness, rng, rng.choice(ALL_FILES), rng.choice(CORRUPTIONS))


def corrupt_file(harness: Harness, rng: random.Random, name: str, how: str) -> Case:
    """Corrupt one file of the latest checkpoint of an interrupted run."""
    case = harness.halfway()
    latest = case.latest_step()
    corrupt(case.store.checkpoints()[-1] / name, how, rng)
    if case.latest_step() == latest:
        case.report("rough", f"{name}, {how}: the corruption is not noticed")
    result = harness.finish(case, is_corrupt=True)
    if f"step-{latest:06d} is damaged" not in result.out:
        case.report("rough", f"{name}, {how}: no warning")
    if not list(case.store.folder.glob(f"step-{latest:06d}.damaged-*")):
        case.report("lost", f"{name}, {how}: not renamed")
    return case


def broken_link(harness: Harness, rng: random.Random) -> Case:
    """`best` or `last` is missing, dangling or something else."""
    return corrupt_link(harness, rng.choice(("best", "last")), rng.choice(LINK_CORRUPTIONS))


def corrupt_link(harness: Harness, which: str, how: str) -> Case:
    """Break one link of an interrupted run."""
    case = harness.halfway()
    link = case.store.folder / which
    link.unlink()
    match how:
        case "dangling":
            files.set_link(link, "step-999999")
        case "garbage":
            link.write_bytes(b"\xff\x00 nonsense\n")
        case "folder":
            link.mkdir()
            (link / "something").write_text("x", encoding="utf-8")
    harness.finish(case)
    return case


def corrupt_log(harness: Harness, rng: random.Random) -> Case:
    """The logs are missing or end in half a line."""
    return corrupt_log_in(harness, rng.choice(("delete", "half a line more", "half a line less")))


def corrupt_log_in(harness: Harness, how: str) -> Case:
    """Corrupt the logs of an interrupted run."""
    case = harness.halfway()
    for name in ("metrics.jsonl", "log.md"):
        path = case.run / name
        if how == "delete":
            path.unlink()
        elif how == "half a line more":
            with path.open("ab") as file:
                file.write(b'{"event": "train", "st')
        else:
            # As after a power loss: shorter than when the checkpoint was saved.
            path.write_bytes(path.read_bytes()[:-1500])
    harness.finish(case, logs_intact=how == "half a line more")
    return case


def clock_jumps(harness: Harness, rng: random.Random) -> Case:
    """All clocks jump back by hours, or stop, at some moment."""
    case = harness.case()
    result = harness.go(case, Injection(_operation(harness, rng), rng.choice(("clock", "stall"))))
    if result.code:
        case.report("lost", f"exit {result.code}: {result.err.strip()[-200:]}")
    harness.finish(case)
    return case


def corrupt(path: Path, how: str, rng: random.Random) -> None:
    """Corrupt a file as disks do."""
    data = bytearray(path.read_bytes())
    match how:
        case "delete":
            path.unlink()
            return
        case "flip":
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case "cut":
            del data[rng.randrange(1, len(data)) :]
        case "empty":
            data.clear()
    path.write_bytes(data)


def unavailable_reason(fault: Fault) -> str | None:
    """Why a fault cannot be injected on this machine, or None."""
    if fault in (stop_signal, stop_in_evaluation) and os.name == "nt":
        return "Windows has no such signals"
    needs_mount = fault in (disk_full, disk_too_small, becomes_unwritable)
    return mount_problem() if needs_mount else None


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_at_operation,
        kill_in_a_write,
        kill_any_time,
        stop_signal,
        stop_in_evaluation,
        short_time_limit,
        disk_full,
        disk_too_small,
        becomes_unwritable,
        refused,
        corrupt_checkpoint,
        broken_link,
        corrupt_log,
        clock_jumps,
    )
}


def _operation(harness: Harness, rng: random.Random) -> int:
    """A random change of the disk, more often one of the last ones."""
    last = harness.reference.operations
    return rng.randint(last - FINAL if rng.random() < 0.2 else 1, last)


@contextmanager
def _tmpfs(case: Case, size: str) -> Iterator[None]:
    """Mount a separate disk for a case."""
    folder = case.disk
    options = ["-t", "tmpfs", "-o", f"size={size}", "gptforge-faults", str(folder)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        # Lazily, if a process that is about to end still uses it.
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            time.sleep(0.2)
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def clean(case: Case) -> None:
    """Delete the files of a case."""
    shutil.rmtree(case.folder, ignore_errors=True)
