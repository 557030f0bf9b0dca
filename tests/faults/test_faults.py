"""Each fault once or a few times, always the same ones.

python -m pytest tests/faults -n 0
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.case import Case, expect_one_error_line
from tests.faults.child import Injection
from tests.faults.faults import (
    ALL_FILES,
    CORRUPTIONS,
    FAULTS,
    LINK_CORRUPTIONS,
    clean,
    corrupt_file,
    corrupt_link,
    corrupt_log_in,
    unavailable_reason,
)
from tests.faults.harness import Harness

RUN_ONCE = [
    name for name in FAULTS if not name.startswith(("corrupt", "broken", "clock", "kill_at"))
]
# Every file and every way once; all pairs are left to longer rounds.
FILE_CORRUPTIONS = [(name, CORRUPTIONS[i % 4]) for i, name in enumerate(ALL_FILES)]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    yield Harness(Path(tmp_path_factory.mktemp("faults")))


def expect_no_violations(case: Case) -> None:
    violations = [f"{violation.kind}: {violation.what}" for violation in case.violations]
    clean(case)
    assert violations == []


@pytest.mark.parametrize("name", RUN_ONCE)
def test_run_ends_as_if_nothing_had_happened(harness, name) -> None:
    if reason := unavailable_reason(FAULTS[name]):
        pytest.skip(reason)
    expect_no_violations(FAULTS[name](harness, random.Random(1)))


# Before the first save; during saves; counted from the end, where the run is nearly finished.
@pytest.mark.parametrize("at", [4, 70, 200, -21, -17, -12, -4])
def test_kill_between_two_changes_of_the_disk(harness, at) -> None:
    case = harness.case()
    number = at if at > 0 else harness.reference.operations + at
    assert harness.go(case, Injection(number, "kill")).code != 0
    harness.finish(case)
    expect_no_violations(case)


@pytest.mark.parametrize(("name", "how"), FILE_CORRUPTIONS)
def test_corrupt_file_is_noticed_and_the_previous_checkpoint_used(harness, name, how) -> None:
    expect_no_violations(corrupt_file(harness, random.Random(2), name, how))


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("how", LINK_CORRUPTIONS)
def test_broken_link_is_repaired(harness, which, how) -> None:
    expect_no_violations(corrupt_link(harness, which, how))


@pytest.mark.parametrize("how", ["delete", "half a line more", "half a line less"])
def test_corrupt_logs_do_not_stop_a_run(harness, how) -> None:
    expect_no_violations(corrupt_log_in(harness, how))


@pytest.mark.parametrize("how", ["clock", "stall"])
def test_clocks_may_jump_back_or_stop(harness, how) -> None:
    case = harness.case()
    result = harness.go(case, Injection(100, how))
    assert result.code == 0, result.err
    harness.finish(case)
    expect_no_violations(case)


def test_folder_without_write_permission_is_one_line_of_error(harness) -> None:
    case = harness.case()
    result = harness.go(case, Injection(1, "refuse", "EACCES"))
    expect_one_error_line(case, result, 1, 2)
    harness.finish(case)
    expect_no_violations(case)
