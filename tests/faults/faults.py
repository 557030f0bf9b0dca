"""The faults. Each makes one run go wrong in one way, has it finished, and returns the complaints.

A function takes the bench and a seeded random generator, so a round can be had again by its seed.
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
from gptforge.checkpoint.store import CHECKPOINT_FILES, MANIFEST
from tests.faults.case import Case, one_error_line
from tests.faults.child import BALLAST, Strike, remount
from tests.faults.harness import BATCHES, Bench, can_mount, send

Fault = Callable[[Bench, random.Random], Case]

CHECKPOINT_FILES = (*CHECKPOINT_FILES, MANIFEST)
SPOILERS = ("flip", "cut", "empty", "delete")
POINTER_SPOILERS = ("missing", "dangling", "garbage", "folder")
FINAL = 30
"""Changes of the disk from the last save on, about."""
REFUSALS = ("ENOSPC", "EIO", "EACCES", "EROFS")


def kill_at_operation(bench: Bench, dice: random.Random) -> Case:
    """Kill -9 between two changes of the disk; sometimes the restart is killed as well."""
    case = bench.case()
    for _ in range(dice.choice((1, 1, 2, 3))):
        if bench.go(case, Strike(_operation(bench, dice), "kill")).code == 0:
            break
    bench.finish(case)
    return case


def kill_in_a_write(bench: Bench, dice: random.Random) -> Case:
    """Kill -9 when half of a file's bytes are written."""
    case = bench.case()
    bench.go(case, Strike(_operation(bench, dice), "tear"))
    bench.finish(case, torn_end_is_fine=True)
    return case


def kill_any_time(bench: Bench, dice: random.Random) -> Case:
    """Kill -9 from outside, whatever the program is doing."""
    case = bench.case()
    process = bench.start(case)
    process.join(dice.uniform(0, bench.reference.seconds))
    process.kill()
    bench.wait(case, process)
    bench.finish(case, torn_end_is_fine=True)
    return case


def stop_signal(bench: Bench, dice: random.Random) -> Case:
    """SIGTERM or SIGINT, once or twice, at a change of the disk or at any moment."""
    case = bench.case()
    number = dice.choice((signal.SIGTERM, signal.SIGINT))
    times = dice.choice((1, 2))
    if dice.random() < 0.5:
        at = _operation(bench, dice)
        later = at + dice.randrange(1, 30)
        ended = bench.go(case, *(Strike(n, number.name) for n in (at, later)[:times]))
    else:
        process = bench.start(case)
        # Not in the first moments: a process that is only being made has no manners yet.
        process.join(dice.uniform(0.1, bench.reference.seconds))
        for _ in range(times):
            send(process, number)
            process.join(dice.uniform(0, 0.05))
        ended = bench.wait(case, process)
    if ended.code not in (0, 128 + number):
        case.complain("rough", f"{number.name} x{times}: exit {ended.code}")
    bench.finish(case, torn_end_is_fine=times == 2)
    return case


def stop_in_evaluation(bench: Bench, dice: random.Random) -> Case:
    """SIGTERM, SIGINT or kill -9 while held-out text is evaluated, in several sessions in a row."""
    case = bench.case()
    for _ in range(dice.randrange(1, 9)):
        action = dice.choice(("SIGTERM", "SIGTERM", "SIGINT", "kill"))
        at = dice.randrange(1, 2 * BATCHES)
        ended = bench.go(case, Strike(at, action, in_evaluation=True))
        wanted = signal.SIGKILL if action == "kill" else signal.Signals[action]
        if ended.code not in (0, 128 + wanted):
            case.complain("rough", f"{action} in an evaluation: exit {ended.code}")
    bench.finish(case, torn_end_is_fine=True)
    return case


def short_time_limit(bench: Bench, dice: random.Random) -> Case:
    """Sessions of a few hundredths of a second each, until the run is finished."""
    case = bench.case()
    for _ in range(100):
        limit = Strike(0, "limit", str(dice.choice((0.0, 0.05, 0.2))))
        ended = bench.go(case, limit, more=("--time_limit", "0.0001"))
        if ended.code:
            case.complain("lost", f"a short session ends with exit {ended.code}: {ended.err}")
            break
        if "time limit of" not in ended.out:
            break
    else:
        case.complain("lost", "100 short sessions did not finish the run")
    bench.finish(case)
    return case


def disk_full(bench: Bench, dice: random.Random) -> Case:
    """A small disk fills up, to the last byte, in the middle of something; then there is room."""
    case = bench.case()
    with _tmpfs(case, "24m"):
        ended = bench.go(case, Strike(_operation(bench, dice), "fill", str(case.disk)))
        if ended.code:  # the last operations need no room
            one_error_line(case, ended, 1)
            # Still full: it says so again, and loses nothing by it.
            one_error_line(case, bench.go(case), 1)
        if dice.random() < 0.5:
            remount(str(case.disk), "size=64m")
        else:
            (case.disk / BALLAST).unlink(missing_ok=True)
        bench.finish(case)
    return case


def disk_too_small(bench: Bench, dice: random.Random) -> Case:
    """A disk with room for a few checkpoints only; then it grows."""
    case = bench.case()
    with _tmpfs(case, f"{dice.randrange(8600, 10500)}k"):
        one_error_line(case, bench.go(case), 1)
        remount(str(case.disk), "size=64m")
        bench.finish(case)
    return case


def becomes_unwritable(bench: Bench, dice: random.Random) -> Case:
    """The file system turns read-only, from the start or in the middle; then it is well again."""
    case = bench.case()
    with _tmpfs(case, "64m"):
        if dice.random() < 0.25:
            remount(str(case.disk), "ro")
        ended = bench.go(case, Strike(_operation(bench, dice), "readonly", str(case.disk)))
        if ended.code:
            one_error_line(case, ended, 1, 2)
            one_error_line(case, bench.go(case), 1, 2)
        remount(str(case.disk), "rw")
        bench.finish(case)
    return case


def refused(bench: Bench, dice: random.Random) -> Case:
    """Every change of the disk is refused from some moment on; needs no mount and no root."""
    case = bench.case()
    error = dice.choice(REFUSALS)
    ended = bench.go(case, Strike(_operation(bench, dice), "refuse", error))
    if ended.code:
        one_error_line(case, ended, 1, 2)
    bench.finish(case)
    return case


def damaged_checkpoint(bench: Bench, dice: random.Random) -> Case:
    """A file of the newest checkpoint is changed, cut, emptied or gone."""
    return damage_one(bench, dice, dice.choice(CHECKPOINT_FILES), dice.choice(SPOILERS))


def damage_one(bench: Bench, dice: random.Random, name: str, how: str) -> Case:
    """Spoil one file of the newest checkpoint of a run that was cut short."""
    case = bench.halfway()
    newest = case.newest()
    spoil(case.store.checkpoints()[-1] / name, how, dice)
    if case.newest() == newest:
        case.complain("rough", f"{name}, {how}: the damage is not noticed")
    ended = bench.finish(case, is_damaged=True)
    if f"step-{newest:06d} is damaged" not in ended.out:
        case.complain("rough", f"{name}, {how}: no warning")
    if not list(case.store.folder.glob(f"step-{newest:06d}.damaged-*")):
        case.complain("lost", f"{name}, {how}: not set aside")
    return case


def damaged_pointer(bench: Bench, dice: random.Random) -> Case:
    """`best` or `last` is missing, or leads nowhere, or is something else."""
    return damage_pointer(bench, dice.choice(("best", "last")), dice.choice(POINTER_SPOILERS))


def damage_pointer(bench: Bench, which: str, how: str) -> Case:
    """Spoil one pointer of a run that was cut short."""
    case = bench.halfway()
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
    bench.finish(case)
    return case


def damaged_log(bench: Bench, dice: random.Random) -> Case:
    """The logs are gone, or end in half a line."""
    return damage_log(bench, dice.choice(("delete", "half a line more", "half a line less")))


def damage_log(bench: Bench, how: str) -> Case:
    """Spoil the logs of a run that was cut short."""
    case = bench.halfway()
    for name in ("metrics.jsonl", "log.md"):
        path = case.run / name
        if how == "delete":
            path.unlink()
        elif how == "half a line more":
            with path.open("ab") as file:
                file.write(b'{"event": "train", "st')
        else:
            # As power loss leaves it: shorter than it was when the checkpoint was made.
            path.write_bytes(path.read_bytes()[:-1500])
    bench.finish(case, logs_whole=how == "half a line more")
    return case


def clock_jumps(bench: Bench, dice: random.Random) -> Case:
    """All clocks jump back by hours, or stand still, from some moment on."""
    case = bench.case()
    ended = bench.go(case, Strike(_operation(bench, dice), dice.choice(("clock", "stall"))))
    if ended.code:
        case.complain("lost", f"exit {ended.code}: {ended.err.strip()[-200:]}")
    bench.finish(case)
    return case


def spoil(path: Path, how: str, dice: random.Random) -> None:
    """Do to a file what disks do."""
    data = bytearray(path.read_bytes())
    match how:
        case "delete":
            path.unlink()
            return
        case "flip":
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case "cut":
            del data[dice.randrange(1, len(data)) :]
        case "empty":
            data.clear()
    path.write_bytes(data)


def why_not(fault: Fault) -> str | None:
    """Why a fault cannot be had on this machine, or None."""
    if fault in (stop_signal, stop_in_evaluation) and os.name == "nt":
        return "Windows has no such signals"
    needs_mount = fault in (disk_full, disk_too_small, becomes_unwritable)
    return can_mount() if needs_mount else None


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
        damaged_checkpoint,
        damaged_pointer,
        damaged_log,
        clock_jumps,
    )
}


def _operation(bench: Bench, dice: random.Random) -> int:
    """Any change of the disk; more often one of the last, where a run is all but finished."""
    last = bench.reference.operations
    return dice.randint(last - FINAL if dice.random() < 0.2 else 1, last)


@contextmanager
def _tmpfs(case: Case, size: str) -> Iterator[None]:
    """A disk of its own for a case; unmounted whatever happens."""
    folder = case.disk
    options = ["-t", "tmpfs", "-o", f"size={size}", "gptforge-faults", str(folder)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        # Lazily, if a process that is about to end still holds it.
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            time.sleep(0.2)
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def clean(case: Case) -> None:
    """Free the space of a case that is done with."""
    shutil.rmtree(case.folder, ignore_errors=True)
