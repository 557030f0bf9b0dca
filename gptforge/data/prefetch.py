"""Background prefetching: a thread loads the next batches while the current one is used."""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

Task = tuple[Callable[[int], Tensor], int, Future[Tensor]]


class Prefetcher:
    """Loads batches in a daemon thread, which never delays the exit of the process.

    Args:
        load: makes the batch at a position.
        step: distance between the positions of consecutive batches.
        depth: how many batches to load ahead.
    """

    def __init__(self, load: Callable[[int], Tensor], *, step: int, depth: int) -> None:
        self._load, self._step, self._depth = load, step, depth
        self._pending: deque[tuple[int, Future[Tensor]]] = deque()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._tasks.put, None)

    def get(self, position: int) -> Tensor:
        """The batch at a position; re-raises what went wrong while loading it.

        It is ready, or being loaded, if `position` follows that of the previous call; any other
        position discards what was prefetched.
        """
        if not self._pending or self._pending[0][0] != position:
            self._pending.clear()
            self._submit(position)
        _, batch = self._pending.popleft()
        for i in range(len(self._pending), self._depth):
            self._submit(position + self._step * (i + 1))
        return batch.result()

    def _submit(self, position: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run_tasks, args=(self._tasks,), name="prefetch", daemon=True
            )
            self._thread.start()
        future: Future[Tensor] = Future()
        self._pending.append((position, future))
        self._tasks.put((self._load, position, future))


def _run_tasks(tasks: "queue.SimpleQueue[Task | None]") -> None:
    while (task := tasks.get()) is not None:
        load, position, future = task
        try:
            future.set_result(load(position))
        except BaseException as error:
            future.set_exception(error)
        # Keep no reference while waiting, so that an unused data loader is freed.
        del task, load, future
