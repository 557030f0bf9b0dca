"""Find an address and a free port for the page."""

import errno
import os
import socket

from gptforge.errors import RunError, UserError

FIRST_PORT = 7860
NUM_PORTS = 100
HOST_HINT = "give 127.0.0.1 for this machine only, 0.0.0.0 to allow others"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the given port, or for 0 on the first free one from 7860."""
    ports = [port] if port else range(FIRST_PORT, FIRST_PORT + NUM_PORTS)
    for candidate in ports:
        if listener := _try_to_listen(host, candidate):
            return listener
    if port:
        raise RunError(f"--port {port}: taken by another program: choose another, or leave it out")
    raise RunError(f"the ports {ports[0]} to {ports[-1]} are all taken: choose another --port")


def _try_to_listen(host: str, port: int) -> socket.socket | None:
    """None if the port is taken."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: unknown address: {HOST_HINT}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name != "nt":
            # A recently closed port is free; on Windows this would share a port in use.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        # On Windows, EACCES means that another program has the port exclusively.
        if error.errno == errno.EADDRINUSE or (error.errno == errno.EACCES and os.name == "nt"):
            return None
        if error.errno == errno.EACCES:
            raise UserError(
                f"--port {port}: not permitted to listen there: choose one above 1023"
            ) from None
        raise UserError(
            f"--host {host}: not an address of this machine ({error.strerror}): {HOST_HINT}"
        ) from None
    return listener
