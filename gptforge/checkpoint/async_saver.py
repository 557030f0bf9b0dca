"""Saves checkpoints in a background thread, one at a time."""

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptforge.checkpoint.format import Snapshot
from gptforge.checkpoint.store import CheckpointStore
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
        self._keep, self._protected_steps, self._enabled = keep, protected_steps, enabled
        self._thread: threading.Thread | None = None
        self._saved: list[SavedCheckpoint] = []
        self._error: BaseException | None = None

    def save_async(self, step: int, snapshot: Snapshot, *, is_best: bool) -> None:
        """Start to save a snapshot, once the previous save is complete; raises that one's error."""
        if not self._enabled:
            return
        self.wait()
        self.store.check_disk_space(snapshot.nbytes)
        device = next(iter(snapshot.model.values())).device
        # After the copies that make up the snapshot.
        copied = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        # Not a daemon: a program that ends with an error still completes its save.
        self._thread = threading.Thread(
            target=self._save, args=(step, snapshot, is_best, copied), name="saver"
        )
        self._thread.start()

    def poll(self) -> list[SavedCheckpoint]:
        """Checkpoints completed since the last call; raises the error of a failed save."""
        self._raise_error()
        saved = self._saved[:]
        # The thread may append meanwhile.
        del self._saved[: len(saved)]
        return saved

    def wait(self) -> None:
        """Wait for a running save; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _save(
        self, step: int, snapshot: Snapshot, is_best: bool, copied: torch.cuda.Event | None
    ) -> None:
        try:
            with _side_stream(copied):
                name = self.store.save(
                    step, snapshot, tokenizer=self._tokenizer, config=self._config
                )
            with self.store.disk_errors(name):
                if is_best:
                    self.store.set_link("best", name)
                self.store.prune(self._keep, self._protected_steps)
            self._saved.append(SavedCheckpoint(step, name, is_best))
        except BaseException as error:
            self._error = error


@contextmanager
def _side_stream(after: torch.cuda.Event | None) -> Iterator[None]:
    """Copy on a separate stream: on the default one each copy would wait for training."""
    if after is None:
        yield
        return
    stream = torch.cuda.Stream(after.device)
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        yield
    stream.synchronize()
