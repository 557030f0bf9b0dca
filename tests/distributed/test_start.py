"""A rank that is lost before all have met is named by the others, and nobody waits for long."""

import os
import signal
import sys
import time

import pytest

from gptforge.distributed import Ranks
from gptforge.errors import UserError
from tests.distributed.spawn import ends_of, ends_of_start

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
SILENCE = 3.0
"""Ranks wait for one and a half times as long."""


def stops(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)


def hangs(rank: int) -> None:
    if rank == 1:
        time.sleep(600)


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)


def makes_a_mistake(rank: int) -> None:
    if rank == 1:
        raise UserError("--max_stepz is unknown")


def lacks_its_number(rank: int) -> None:
    if rank == 1:
        del os.environ["RANK"]


def goes_elsewhere(rank: int) -> None:
    if rank == 1:
        os.environ["MASTER_PORT"] = "1"


def first_one_stops(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


@LINUX
@pytest.mark.parametrize(
    "trouble", [stops, hangs, dies, makes_a_mistake, lacks_its_number, goes_elsewhere]
)
def test_a_rank_that_does_not_come_is_named_by_the_first(trouble) -> None:
    first, lost, other = ends_of_start(3, trouble, silence=SILENCE)
    assert first.code == 1
    assert "rank 1 of 3 did not start within 4 seconds" in first.said
    assert other.code == 1
    if trouble in (makes_a_mistake, lacks_its_number):
        assert lost.code == 2 and "error: " in lost.said
    if trouble is goes_elsewhere:
        assert lost.code == 1 and "rank 1 on" in lost.said and "cannot join" in lost.said


@LINUX
def test_without_the_first_rank_the_others_say_so() -> None:
    _, *others = ends_of_start(3, first_one_stops, silence=SILENCE)
    for other in others:
        assert other.code == 1
        assert "error: " in other.said


def hangs_before_the_first_step(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(8)
    ranks.on_first(lambda: None)
    ranks.all_of(True)


@LINUX
def test_a_rank_that_keeps_others_waiting_before_the_first_step_is_named() -> None:
    first, second = ends_of(2, hangs_before_the_first_step, silence=2)
    assert (first.code, second.code) == (0, 0)
    assert "the other ranks are waiting for rank 1 on" in first.said
