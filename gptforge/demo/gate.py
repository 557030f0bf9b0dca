"""What stands before the page: requests larger than a page of text are turned away unread.

A visitor sends a prompt and a few numbers. Gradio would also take files of any size, and keep them.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

LARGEST = 64_000
"""Bytes of a request: a prompt of four thousand characters, as JSON, and what goes with it."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Gate:
    """An ASGI application around another one."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand the request on, unless it is a file or too large."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        if scope["path"].rstrip("/").endswith("/upload"):
            return await _refuse(send, 403, b"this page takes no files")
        length = dict(scope["headers"]).get(b"content-length", b"")
        # Without a length it would have to be read to be measured; browsers always send one.
        if not length.isdigit() or int(length) > LARGEST:
            return await _refuse(send, 413, b"too much for one request")
        return await self._app(scope, receive, send)


async def _refuse(send: Send, status: int, why: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why})
