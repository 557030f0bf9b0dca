"""Background prefetching: a thread loads the next batches while the current one is used."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class Prefetcher:
    """Loads batches in one thread, which ends with `close`.

    Args:
        load: makes the batch at a position.
        step: distance between the positions of consecutive batches.
        depth: how many batches to load ahead.
    """

    def __init__(self, load: Callable[[int], Tensor], *, step: int, depth: int) -> None:
        self._load, self._step, self._depth = load, step, depth
        self._pending: deque[tuple[int, Future[Tensor]]] = deque()
        self._executor = ThreadPoolExecutor(1, "prefetch")

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

    def close(self) -> None:
        """End the thread, after the batch that it is loading."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _submit(self, position: int) -> None:
        self._pending.append((position, self._executor.submit(self._load, position)))
