"""Visitors in turn: a few texts are generated at a time, the other visitors wait."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing
from typing import TypeVar

from starlette.concurrency import iterate_in_threadpool

MAX_CONCURRENT = 2  # requests that are answered at the same time
MAX_QUEUED = 24  # requests that wait; further ones are refused
POLL_SECONDS = 0.2

T = TypeVar("T")


class GenerationQueue:
    """First come, first served, until `is_stopping`; used by the event loop only: no lock."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._num_running = 0
        self._waiting: list[object] = []

    @property
    def is_full(self) -> bool:
        """Whether another request would be one too many."""
        return len(self._waiting) >= MAX_QUEUED

    async def run(self, chunks: Generator[T]) -> AsyncGenerator[T | int]:
        """Iterate over `chunks` in a thread, when its turn has come; until then yield its position.

        A client that disconnects cancels this, which ends the generation.
        """
        ticket = object()
        self._waiting.append(ticket)
        try:
            while (ahead := self._waiting.index(ticket)) or self._num_running >= MAX_CONCURRENT:
                if self._is_stopping():
                    return
                yield ahead + 1
                await asyncio.sleep(POLL_SECONDS)
            self._num_running += 1
        finally:
            self._waiting.remove(ticket)
        try:
            with closing(chunks):
                async for chunk in iterate_in_threadpool(chunks):
                    if self._is_stopping():
                        break
                    yield chunk
        finally:
            self._num_running -= 1
