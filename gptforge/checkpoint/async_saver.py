"""Saves checkpoints in a background thread, one at a time."""

from collections.abc import Collection, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptforge.checkpoint.format import Snapshot
from gptforge.checkpoint.store import CheckpointStore
from gptforge.cuda_capture import CUDA_CAPTURE_LOCK
from gptforge.tokenizers import Tokenizer


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk."""

    step: int
    name: str
    is_best: bool


class AsyncSaver:
    """Writes snapshots to a store while training continues.

    A snapshot holds copies on the training device, which are cheap; they are moved to the CPU and
    to disk in the background. `last`, `best` and pruning follow only once a checkpoint is complete.

    Args:
        store: where to save.
        tokenizer: saved with every checkpoint, as is `config`, the text of config.toml.
        keep: number of checkpoints to keep besides best and last.
        protected_steps: the checkpoints of these steps are kept, too.
        enabled: False on ranks other than 0, which save nothing.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        tokenizer: Tokenizer,
        config: str,
        keep: int,
        protected_steps: Collection[int | None] = (),
        enabled: bool = True,
    ) -> None:
        self.store, self._tokenizer, self._config = store, tokenizer, config
        self._keep, self.protected_steps, self._enabled = keep, protected_steps, enabled
        self._running: Future[SavedCheckpoint] | None = None
        self._saved: list[SavedCheckpoint] = []

    def save_async(self, step: int, snapshot: Snapshot, *, is_best: bool) -> None:
        """Start to save a snapshot, once the previous save is complete; raises that one's error."""
        if not self._enabled:
            return
        self.wait()
        self.store.check_disk_space(snapshot.nbytes)
        device = next(iter(snapshot.model.values())).device
        # After the copies that make up the snapshot.
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        executor = ThreadPoolExecutor(1, "saver")
        self._running = executor.submit(self._save, step, snapshot, is_best, copied)
        # The thread ends after this save. A program that ends with an error still completes it.
        executor.shutdown(wait=False)

    def poll(self) -> list[SavedCheckpoint]:
        """Checkpoints completed since the last call; raises the error of a failed save."""
        if self._running is not None and self._running.done():
            self.wait()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Wait for a running save; raises its error. After Ctrl-C it can be waited for again."""
        if self._running is not None:
            futures.wait([self._running])
            running, self._running = self._running, None
            self._saved.append(running.result())

    def _save(
        self, step: int, snapshot: Snapshot, is_best: bool, copied: torch.cuda.Event | None
    ) -> SavedCheckpoint:
        with _side_stream(copied):
            name = self.store.save(step, snapshot, tokenizer=self._tokenizer, config=self._config)
        with self.store.disk_errors(name):
            if is_best:
                self.store.set_link("best", name)
            self.prune()
        return SavedCheckpoint(step, name, is_best)

    def prune(self) -> None:
        """Delete the checkpoints that are not to be kept."""
        if self._enabled:
            self.store.prune(self._keep, self.protected_steps)


@contextmanager
def _side_stream(after: torch.cuda.Event | None) -> Iterator[None]:
    """Copy on a separate stream: on the default one each copy would wait for training."""
    if after is None:
        yield
        return
    with CUDA_CAPTURE_LOCK:
        stream = torch.cuda.Stream(after.device)
        with torch.cuda.stream(stream):
            stream.wait_event(after)
            yield
        stream.synchronize()
