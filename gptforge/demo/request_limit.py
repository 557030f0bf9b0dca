"""A filter before the page: hosts, body sizes and paths that no visitor needs are refused.

Visitors send a prompt and a few numbers to Gradio's queue, or JSON to `/v1/completions`. Gradio
would also accept files of any size, and requests by other web sites open in the visitor's browser.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64_000
"""A prompt of four thousand characters as JSON, and the other fields."""
BODY_TIMEOUT = 20.0
"""Seconds for a body to arrive."""
POST_PATHS = ("/queue/join", "/run/predict", "/cancel", "/reset", "/v1/completions")
"""Suffixes of the paths that accept a body; Gradio has many more, for uploads and API clients."""
MAX_SESSIONS = 1000
"""Sessions whose last request is remembered."""
DISCONNECT_SECONDS = 3.0
"""A text whose events are not read for this long is stopped."""


class EventStreams:
    """The event streams that Gradio's sessions have open.

    Gradio generates for disconnected sessions too, and keeps all of it in memory.
    """

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._blocked_since: dict[str, float] = {}
        self._joined_at: dict[str, float] = {}

    def record_join(self, body: bytes) -> None:
        """Note the time of a session's request, from the request's body."""
        try:
            session = json.loads(body)["session_hash"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(session, str) and len(session) < 100:
            self._joined_at[session] = time.monotonic()
            while len(self._joined_at) > MAX_SESSIONS:
                del self._joined_at[next(iter(self._joined_at))]

    def is_connected(self, session: str | None) -> bool:
        """Whether a session has a stream open and reads from it."""
        if session is None or not self._open.get(session):
            return False
        now = time.monotonic()
        return now - self._blocked_since.get(session, now) < DISCONNECT_SECONDS

    def wait_until_connected(self, session: str | None) -> bool:
        """Block until a session connects, at most `DISCONNECT_SECONDS` after its request."""
        deadline = self._joined_at.get(session or "", 0.0) + DISCONNECT_SECONDS
        while not (is_connected := self.is_connected(session)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return is_connected

    async def track(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an event stream on and note while it is open or blocked."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        [session, *_] = query.get("session_hash", [""])

        async def timed_send(message: Message) -> None:
            self._blocked_since[session] = time.monotonic()
            await send(message)
            self._blocked_since.pop(session, None)

        self._open[session] = self._open.get(session, 0) + 1
        try:
            await app(scope, receive, timed_send)
        finally:
            self._open[session] -= 1
            if not self._open[session]:
                del self._open[session]
                self._blocked_since.pop(session, None)


class RequestFilter:
    """ASGI middleware that passes on only requests that the page makes.

    Args:
        app: the page.
        allowed_hosts: host names besides this machine's; `*` for all.
        event_streams: updated with the streams of all sessions.
    """

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: Collection[str], event_streams: EventStreams
    ) -> None:
        self._app, self._event_streams = app, event_streams
        self._hosts = {host.strip("[]").lower() for host in allowed_hosts} | {"localhost"}
        self._hosts |= {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)

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
        path = "/" + scope["path"].strip("/")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            if path.endswith("/queue/data"):
                return await self._event_streams.track(self._app, scope, receive, send)
            return await self._app(scope, receive, send)
        origins = headers.getlist("origin")
        if any(urlsplit(origin).netloc.lower() != host[0].lower() for origin in origins):
            return await refuse(403, "cross-origin requests are not allowed")
        if not path.endswith(POST_PATHS):
            return await refuse(403, "this page does not accept such requests")
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_TIMEOUT)
        except TimeoutError:
            return await refuse(408, "the request took too long to arrive")
        if body is None:
            return await refuse(413, "the request is too large")
        if path.endswith("/queue/join"):
            self._event_streams.record_join(body)
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    def _is_allowed(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        if "*" in self._hosts or name in self._hosts:
            return True
        try:
            # An IP address cannot be rebound.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


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
