"""Saving while training goes on: one checkpoint at a time, in a thread of its own."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptforge.checkpoint.store import CheckpointStore, Snapshot
from gptforge.tokenizers import Tokenizer


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is whole and on the disk."""

    step: int
    name: str
    is_best: bool


class AsyncSaver:
    """Writes snapshots to a store.

    A snapshot's tensors are copies on the training device, so taking one costs little; they travel
    to the CPU and the disk beside the training. `last`, `best` and what is pruned change only when
    a checkpoint is whole.

    Args:
        store: where to.
        tokenizer: goes into every checkpoint.
        config: text of config.toml, likewise.
        keep: checkpoints to keep besides best and last.
    """

    def __init__(
        self, store: CheckpointStore, *, tokenizer: Tokenizer, config: str, keep: int
    ) -> None:
        self.store = store
        self._tokenizer = tokenizer
        self._config = config
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._saved: list[SavedCheckpoint] = []
        self._error: BaseException | None = None

    def save_async(self, step: int, snapshot: Snapshot, *, is_best: bool) -> None:
        """Begin to write; waits for the one before.

        Raises:
            RunError: if the disk has no room, or had none for the one before.
        """
        self.wait()
        self.store.check_disk_space(snapshot.nbytes)
        ready = _event(snapshot)
        # Not a daemon: a program that ends by an error still finishes its save.
        self._thread = threading.Thread(
            target=self._write, args=(step, snapshot, is_best, ready), name="saver"
        )
        self._thread.start()

    def poll(self) -> list[SavedCheckpoint]:
        """What was finished since the last call; raises the error of a save that failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        saved = self._saved[:]
        # The thread may append meanwhile: take away no more than was seen.
        del self._saved[: len(saved)]
        return saved

    def wait(self) -> None:
        """Come back when nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self, step: int, snapshot: Snapshot, is_best: bool, ready: torch.cuda.Event | None
    ) -> None:
        try:
            with _behind(ready):
                name = self.store.save(
                    step, snapshot, tokenizer=self._tokenizer, config=self._config
                )
            with self.store.disk_errors(name):
                if is_best:
                    self.store.set_link("best", name)
                self.store.prune(self._keep)
            self._saved.append(SavedCheckpoint(step, name, is_best))
        except BaseException as error:
            self._error = error


class NullSaver(AsyncSaver):
    """What the ranks behind the first save with: rank 0 writes."""

    def save_async(self, step: int, snapshot: Snapshot, *, is_best: bool) -> None:
        """Rank 0 has the whole of it."""


def _event(snapshot: Snapshot) -> torch.cuda.Event | None:
    """A mark in the GPU's queue behind the copies that the snapshot is made of."""
    tensors = list(snapshot.model.values())
    if not tensors or tensors[0].device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensors[0].device))
    return event


@contextmanager
def _behind(ready: torch.cuda.Event | None) -> Iterator[None]:
    """Copy on a stream of its own: on the usual one each copy would wait for training."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(ready.device)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        yield
    stream.synchronize()
