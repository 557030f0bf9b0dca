"""Reading ahead: a thread of its own makes the batches that come next."""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

Task = tuple[Callable[[int], Tensor], int, Future[Tensor]]


class Prefetcher:
    """Batches by position, `step` apart, `depth` of them made before they are asked for.

    The thread is a daemon: a process that ends, however it does, never waits for it.
    """

    def __init__(self, load: Callable[[int], Tensor], *, step: int, depth: int) -> None:
        self._make, self._step, self._depth = load, step, depth
        self._begun: deque[tuple[int, Future[Tensor]]] = deque()
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        weakref.finalize(self, self._tasks.put, None)

    def get(self, position: int) -> Tensor:
        """The batch at a position; at once, if it is the one that follows the last.

        Whatever went wrong while it was made is raised here.
        """
        if not self._begun or self._begun[0][0] != position:
            self._begun.clear()
            self._begin(position)
        _, wanted = self._begun.popleft()
        for number in range(len(self._begun), self._depth):
            self._begin(position + self._step * (number + 1))
        return wanted.result()

    def _begin(self, position: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_load_batches, args=(self._tasks,), name="reading ahead", daemon=True
            )
            self._thread.start()
        future: Future[Tensor] = Future()
        self._begun.append((position, future))
        self._tasks.put((self._make, position, future))


def _load_batches(tasks: "queue.SimpleQueue[Task | None]") -> None:
    """Until None comes. It holds nothing between tasks, so that a loader can be thrown away."""
    while (task := tasks.get()) is not None:
        make, position, future = task
        try:
            future.set_result(make(position))
        except BaseException as error:
            future.set_exception(error)
        del task, make, future
