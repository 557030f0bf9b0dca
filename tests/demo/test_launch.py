"""Finding an address and a port, before anything is loaded."""

import socket

import pytest

from gptforge.demo.launch import FIRST_PORT, listen
from gptforge.errors import RunError, UserError


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


# 192.0.2.0/24 is reserved for documentation; a name with an empty label needs no DNS request.
@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "::2", "[::2]"])
def test_an_unknown_host_is_refused(host) -> None:
    # Regression: a hundred ports were tried, for eight minutes.
    for port in (0, 7999):
        with pytest.raises(UserError, match=r"--host .*give 127\.0\.0\.1"):
            listen(host, port)


def test_a_taken_port_is_reported(taken, monkeypatch) -> None:
    for host in ("127.0.0.1", "0.0.0.0", "localhost"):
        with pytest.raises(RunError, match=f"--port {taken}: taken"):
            listen(host, taken)
    monkeypatch.setattr("gptforge.demo.launch.FIRST_PORT", taken)
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > taken
    monkeypatch.setattr("gptforge.demo.launch.NUM_PORTS", 1)
    with pytest.raises(RunError, match="all taken"):
        listen("127.0.0.1", 0)


def test_ports_are_tried_from_the_first() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert FIRST_PORT <= listener.getsockname()[1] < FIRST_PORT + 100
        # Connections wait until the page is loaded.
        socket.create_connection(listener.getsockname()).close()
