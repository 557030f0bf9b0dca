"""A filter before the page: hosts, bodies and origins that no visitor needs are refused.

Visitors send a prompt and a few numbers as JSON. Without the filter other web sites, open in a
visitor's browser, could use the model, and bodies of any size would be read.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64_000  # a prompt of four thousand characters as JSON, and the other fields
BODY_TIMEOUT = 20.0  # seconds for a body to arrive
SEND_TIMEOUT = 20.0  # seconds for a client to read what fills the buffers; then its answer ends


class RequestFilter:
    """ASGI middleware; `allowed_hosts` are names besides this machine's, `*` for all."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = {host.strip("[]").lower() for host in allowed_hosts} | {"localhost"}
        self._hosts |= {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_TIMEOUT)

        async def pass_on(receive: Receive) -> None:
            with suppress(TimeoutError):  # of a client that does not read
                await self._app(scope, receive, send_in_time)

        async def refuse(status: int, reason: str) -> None:
            response = PlainTextResponse(reason, status, headers={"connection": "close"})
            await response(scope, receive, send)

        headers = Headers(scope=scope)
        host = headers.getlist("host")
        if len(host) != 1 or not self._is_allowed(host[0]):
            # DNS rebinding: a web site can point its name at this machine and read the answers.
            return await refuse(403, "unknown host: see --allowed_hosts")
        if scope["type"] != "http":
            return await refuse(403, "this page has no websockets")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await pass_on(receive)
        origins = headers.getlist("origin")
        if any(origin.lower().rpartition("//")[2] != host[0].lower() for origin in origins):
            return await refuse(403, "cross-origin requests are not allowed")
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_TIMEOUT)
        except TimeoutError:
            return await refuse(408, "the request took too long to arrive")
        if body is None:
            return await refuse(413, "the request is too large")
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await pass_on(replay)

    def _is_allowed(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            # An IP address cannot be rebound.
            return bool({"*", name} & self._hosts or ipaddress.ip_address(name))
        except ValueError:
            return False


async def _read_body(receive: Receive) -> bytes | None:
    """The body as it arrives, whatever the headers say; None if it is too large."""
    body, has_more = bytearray(), True
    while has_more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        has_more = message["type"] == "http.request" and bool(message.get("more_body"))
    return bytes(body)
