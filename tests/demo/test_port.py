"""Where the page can be shown, found out before anything is loaded."""

import socket

import pytest

from gptforge.demo.port import FIRST_PORT, find_free_port
from gptforge.errors import RunError, UserError


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


# 192.0.2.0 is kept for documentation; a name with nothing between two points is asked of nobody.
@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "::2", "[::2]"])
def test_an_impossible_host_is_refused_at_once_whatever_the_port(host) -> None:
    # It was once tried at a hundred ports, for eight minutes.
    for port in (0, 7999):
        with pytest.raises(UserError, match=r"--host .*give 127\.0\.0\.1"):
            find_free_port(host, port)


def test_a_port_that_is_taken_is_no_mistake_of_the_host(taken, monkeypatch) -> None:
    for host in ("127.0.0.1", "0.0.0.0", "localhost"):
        with pytest.raises(RunError, match=f"--port {taken}: taken"):
            find_free_port(host, taken)
    monkeypatch.setattr("gptforge.demo.port.FIRST_PORT", taken)
    assert find_free_port("127.0.0.1", 0) > taken
    monkeypatch.setattr("gptforge.demo.port.NUM_PORTS", 1)
    with pytest.raises(RunError, match="all taken"):
        find_free_port("127.0.0.1", 0)


def test_one_after_the_other_is_tried_from_the_first_on() -> None:
    assert FIRST_PORT <= find_free_port("127.0.0.1", 0) < FIRST_PORT + 100
