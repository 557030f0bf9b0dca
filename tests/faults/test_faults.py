"""Each fault once or a few times, the same ones every time.

python -m pytest tests/faults -n 0
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.case import Case, one_error_line
from tests.faults.child import Strike
from tests.faults.faults import (
    CHECKPOINT_FILES,
    FAULTS,
    POINTER_SPOILERS,
    SPOILERS,
    clean,
    damage_log,
    damage_one,
    damage_pointer,
    why_not,
)
from tests.faults.harness import Bench

ONCE = [name for name in FAULTS if not name.startswith(("damaged", "clock", "kill_at"))]
# Every file once, in every way, without trying all pairs: those are for the longer rounds.
FILE_DAMAGE = [(name, SPOILERS[i % 4]) for i, name in enumerate(CHECKPOINT_FILES)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(Path(tmp_path_factory.mktemp("faults")))


def expect_well(case: Case) -> None:
    said = [f"{complaint.kind}: {complaint.what}" for complaint in case.complaints]
    clean(case)
    assert said == []


@pytest.mark.parametrize("name", ONCE)
def test_the_run_ends_as_if_nothing_had_happened(bench, name) -> None:
    if reason := why_not(FAULTS[name]):
        pytest.skip(reason)
    expect_well(FAULTS[name](bench, random.Random(1)))


# Early, where nothing is saved; in the saves; from the end, where the run is all but finished.
@pytest.mark.parametrize("at", [4, 70, 200, -21, -17, -12, -4])
def test_kill_between_two_changes_of_the_disk(bench, at) -> None:
    case = bench.case()
    number = at if at > 0 else bench.reference.operations + at
    assert bench.go(case, Strike(number, "kill")).code != 0
    bench.finish(case)
    expect_well(case)


@pytest.mark.parametrize(("name", "how"), FILE_DAMAGE)
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_it_taken(bench, name, how) -> None:
    expect_well(damage_one(bench, random.Random(2), name, how))


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("how", POINTER_SPOILERS)
def test_a_broken_pointer_is_mended(bench, which, how) -> None:
    expect_well(damage_pointer(bench, which, how))


@pytest.mark.parametrize("how", ["delete", "half a line more", "half a line less"])
def test_broken_logs_do_not_stop_a_run(bench, how) -> None:
    expect_well(damage_log(bench, how))


@pytest.mark.parametrize("how", ["clock", "stall"])
def test_clocks_may_jump_back_or_stand_still(bench, how) -> None:
    case = bench.case()
    ended = bench.go(case, Strike(100, how))
    assert ended.code == 0, ended.err
    bench.finish(case)
    expect_well(case)


def test_a_folder_that_may_not_be_written_to_is_one_line_of_error(bench) -> None:
    case = bench.case()
    ended = bench.go(case, Strike(1, "refuse", "EACCES"))
    one_error_line(case, ended, 1, 2)
    bench.finish(case)
    expect_well(case)
