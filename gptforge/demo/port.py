"""Find an address and a free port for the page."""

import errno
import os
import socket

from gptforge.errors import RunError, UserError

FIRST_PORT = 7860
NUM_PORTS = 100
LOCALHOST = "127.0.0.1"
HOST_HINT = f"give {LOCALHOST} for this machine only, 0.0.0.0 to allow others"


def find_free_port(host: str, port: int) -> int:
    """The given port, or for 0 the first free one from 7860; a RunError if there is none.

    Gradio would try ports for seconds each, whatever the error.
    """
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
        # Gradio needs the port on localhost too, whatever the host.
        if _is_free(host, candidate) and _is_free(LOCALHOST, candidate):
            return candidate
    if port:
        raise RunError(f"--port {port}: taken by another program: choose another, or leave it out")
    raise RunError(f"the ports {FIRST_PORT} to {candidate} are all taken: choose another --port")


def _is_free(host: str, port: int) -> bool:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: unknown address: {HOST_HINT}") from None
    family, kind, protocol, _, address = found[0]
    try:
        with socket.socket(family, kind, protocol) as probe:
            if os.name != "nt":
                # A recently closed port is free; on Windows this would share a port in use.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        # On Windows, EACCES means that another program has the port exclusively.
        if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and os.name == "nt"):
            return False
        if error.errno == errno.EACCES:
            raise UserError(
                f"--port {port}: not permitted to listen there: choose one above 1023"
            ) from None
        raise UserError(
            f"--host {host}: not an address of this machine ({error.strerror}): {HOST_HINT}"
        ) from None
    return True
