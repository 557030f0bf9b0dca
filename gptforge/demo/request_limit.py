"""What stands before the page: hosts, sizes and paths that no visitor of it sends are refused.

A visitor sends a prompt and a few numbers to Gradio's queue, or JSON to `/v1/completions`. Gradio
would also take files of any size, and requests of any web site that the visitor has open.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

MAX_BODY_BYTES = 64_000
"""Bytes of a request: a prompt of four thousand characters, as JSON, and what goes with it."""
BODY_TIMEOUT = 20.0
"""A body has to arrive within so many."""
POST_PATHS = ("/queue/join", "/run/predict", "/cancel", "/reset", "/v1/completions")
"""Ends of the paths that take a body; Gradio has many more, for uploads and for its own clients."""
MAX_SESSIONS = 1000
"""Sessions whose last request is remembered."""
DISCONNECT_SECONDS = 3.0
"""A text that nobody has fetched for so long is not written any further."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class EventStreams:
    """Who is fetching what is written: Gradio's sessions, by the event stream that each has open.

    Gradio writes for sessions that nobody listens to as well, and keeps it all.
    """

    def __init__(self) -> None:
        self._streams: dict[str, int] = {}
        self._stuck: dict[str, float] = {}
        self._joined: dict[str, float] = {}

    def record_join(self, body: bytes) -> None:
        """Note when a session asked for a text, from the body of its request."""
        try:
            session = json.loads(body)["session_hash"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(session, str) and len(session) < 100:
            self._joined[session] = time.monotonic()
            while len(self._joined) > MAX_SESSIONS:
                del self._joined[next(iter(self._joined))]

    def is_connected(self, session: str | None) -> bool:
        """Whether a session has a stream open and takes what is sent."""
        if session is None or not self._streams.get(session):
            return False
        return time.monotonic() - self._stuck.get(session, time.monotonic()) < DISCONNECT_SECONDS

    def wait_until_connected(self, session: str | None) -> bool:
        """Whether a session listens within `GONE_SECONDS` of asking; blocks the thread until then.

        Who has waited in the queue for longer, without listening, is not waited for.
        """
        deadline = self._joined.get(session or "", 0.0) + DISCONNECT_SECONDS
        while not (there := self.is_connected(session)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return there

    async def track(self, app: App, scope: Message, receive: Receive, send: Send) -> None:
        """Pass an event stream on and watch it."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session_hash", [""])[0]

        async def watched(message: Message) -> None:
            self._stuck[session] = time.monotonic()
            await send(message)
            self._stuck.pop(session, None)

        self._streams[session] = self._streams.get(session, 0) + 1
        try:
            await app(scope, receive, watched)
        finally:
            self._streams[session] -= 1
            if not self._streams[session]:
                del self._streams[session]
                self._stuck.pop(session, None)


class RequestFilter:
    """An ASGI application around another one.

    Args:
        app: the page.
        hosts: names it may be asked for under, besides this machine's; `*` for all.
        listeners: told of event streams.
    """

    def __init__(
        self, app: App, *, allowed_hosts: Collection[str], event_streams: EventStreams
    ) -> None:
        self._app, self._listeners = app, event_streams
        self._hosts = {host.strip("[]").lower() for host in allowed_hosts} | {"localhost"}
        self._hosts |= {socket.gethostname().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it is one that the page never makes."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        host = [value for name, value in headers if name == b"host"]
        if len(host) != 1 or not self._is_ours(host[0]):
            # A web site can point its own name at this machine, and read what it answers.
            return await _refuse(send, 403, b"unknown host: see --allowed_hosts")
        if scope["type"] != "http":
            return await _refuse(send, 403, b"this page has no websockets")
        path = "/" + scope["path"].strip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if path.endswith("/queue/data"):
                return await self._listeners.track(self._app, scope, receive, send)
            return await self._app(scope, receive, send)
        for name, value in headers:
            if name == b"origin" and urlsplit(value).netloc.lower() != host[0].lower():
                return await _refuse(send, 403, b"a page of another origin may not ask this")
        if not path.endswith(POST_PATHS):
            return await _refuse(send, 403, b"this page takes no such request")
        try:
            body = await asyncio.wait_for(_body(receive), BODY_TIMEOUT)
        except TimeoutError:
            return await _refuse(send, 408, b"the request took too long to arrive")
        if body is None:
            return await _refuse(send, 413, b"too much for one request")
        if path.endswith("/queue/join"):
            self._listeners.record_join(body)
        await self._app(scope, _replay(body, receive), send)

    def _is_ours(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        if "*" in self._hosts or name in self._hosts:
            return True
        try:
            # An address cannot be rebound, as a name can.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def _body(receive: Receive) -> bytes | None:
    """A request's body as it really arrives, whatever its headers say; None if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _refuse(send: Send, status: int, why: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why})
