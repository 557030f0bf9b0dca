"""Where the page can be shown: an address of this machine, and a port that nobody else has."""

import errno
import os
import socket

from gptforge.errors import RunError, UserError

FIRST_PORT = 7860
NUM_PORTS = 100
LOCALHOST = "127.0.0.1"


def find_free_port(host: str, port: int) -> int:
    """A port to listen at: the one asked for, or for 0 the first free one from 7860 on.

    Gradio tries one after the other, seconds each, whatever stands in the way.

    Raises:
        UserError: if the host is none of this machine, or the port is the system's own.
        RunError: if the port is taken, or all of them are.
    """
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
        # Gradio wants the port here as well, whatever address it listens at.
        if _is_free(host, candidate) and _is_free(LOCALHOST, candidate):
            return candidate
    if port:
        raise RunError(f"--port {port}: taken by another program: choose another, or leave it out")
    raise RunError(f"the ports {FIRST_PORT} to {candidate} are all taken: choose another --port")


def _is_free(host: str, port: int) -> bool:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise UserError(
            f"--host {host}: no such address is known here: give {LOCALHOST} for this machine alone, "
            "0.0.0.0 to let others in"
        ) from None
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as tried:
            if os.name != "nt":
                # A port that was left a moment ago is free; on Windows this would share one.
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        if error.errno == errno.EACCES:
            if os.name == "nt":
                # Another program holds it for itself.
                return False
            raise UserError(
                f"--port {port}: you may not listen there: choose one above 1023"
            ) from None
        raise UserError(
            f"--host {host}: not an address of this machine ({error.strerror}): give {LOCALHOST} for "
            "this machine alone, 0.0.0.0 to let others in"
        ) from None
    return True
