"""Batches for training: windows of one token stream, in a resumable order, some batches ahead.

Shapes: G windows in a global batch, g of them this rank's, T tokens in a window.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptforge.data.prefetch import Prefetcher
from gptforge.data.shuffle import epoch_offset, shuffled_index
from gptforge.data.token_dataset import TokenDataset

MAX_PREFETCH = 4
"""Batches read beforehand: a disk may be slow for one of them without anybody waiting."""
MAX_PREFETCH_BYTES = 2**26
"""What they may take, of which one is always allowed."""
INDEX_CHUNK = 2048
"""Windows that are looked up in the order at a time: for a few of them alone numpy's calls would
take longer than their work, and hold Python, which a small model's updates want as well."""


class DataLoader:
    """An endless stream of global batches; its position is its whole state.

    Windows start at 0, T, 2T, ... of the tokens, targets lie one further on, and a last, partial
    window is dropped. Staggered, all windows of an epoch start later by as much as chance says for
    that epoch, less than T: a text is cut anew each time. A batch may reach from one epoch into the
    next. Every rank counts by the same global batches and takes its own rows of each: how many
    ranks there are never changes which windows a step sees.

    Args:
        tokens: the stream, long enough for a window.
        context_length: T.
        global_batch: G.
        seed: with the epoch, it picks the order.
        shuffle: False keeps the order of the text.
        stagger: whether each epoch cuts the text at other places.
        device: where batches go.
        rank: this process, from 0.
        world_size: how many processes share a batch; at most G.
    """

    def __init__(
        self,
        tokens: TokenDataset,
        *,
        context_length: int,
        global_batch: int,
        seed: int,
        shuffle: bool,
        device: torch.device,
        random_offset: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_sequences = sequences_per_epoch(
            len(tokens), context_length, random_offset=random_offset
        )
        assert self.num_sequences > 0, "the text's length is checked before a loader is built"
        assert 0 <= rank < world_size <= global_batch
        self.position = 0
        self.rows = rank_rows(rank, world_size, global_batch)
        self._tokens = tokens
        self._context_length = context_length
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._stagger = random_offset
        self._device = device
        # Copies travel on a stream of their own, beside the computation.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        batch_bytes = 8 * len(self.rows) * (context_length + 1)
        depth = max(1, min(MAX_PREFETCH, MAX_PREFETCH_BYTES // batch_bytes))
        self._read = Prefetcher(self._gather, step=global_batch, depth=depth)
        self._ahead: Tensor | None = None
        self._starts: dict[int, NDArray[np.int64]] = {}
        """First tokens of windows by the batch's position; the reading thread's own."""

    @property
    def epoch(self) -> float:
        """How many times the text has been seen so far."""
        return self.position / self.num_sequences

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next update, this rank's (g, T) int64 on the device."""
        batch = self._ahead if self._ahead is not None else self._send(self.position)
        self._ahead = None
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            batch.record_stream(torch.cuda.current_stream(self._device))
        self.position += self._global_batch
        return batch[:, :-1], batch[:, 1:]

    def prefetch_to_device(self) -> None:
        """Have the next batch set out already, to arrive while the last one is computed on.

        Best once that has begun: a device that waits for work should not wait for this as well.
        """
        if self._ahead is None:
            self._ahead = self._send(self.position)

    def sequence_ids_at(self, position: int) -> list[int]:
        """Numbers of the windows in the whole global batch at a position; window w starts at
        token w * T.
        """
        places = _numbers(range(position, position + self._global_batch))
        windows = shuffled_index(places, self.num_sequences, seed=self._seed, shuffle=self._shuffle)
        return [int(window) for window in windows]

    def state_dict(self) -> dict[str, int]:
        """Windows handed out so far, to all ranks together."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position, in constant time."""
        self.position = state["position"]
        self._ahead = None

    def _gather(self, position: int) -> Tensor:
        if position not in self._starts:
            self._starts = self._look_up(position)
        return read_sequences(self._tokens, self._starts.pop(position), self._context_length)

    def _look_up(self, position: int) -> dict[int, NDArray[np.int64]]:
        """Where this rank's windows begin, in the batch at a position and in some after it."""
        count = -(-INDEX_CHUNK // len(self.rows))
        positions = range(position, position + count * self._global_batch, self._global_batch)
        places = np.add.outer(_numbers(positions), _numbers(self.rows))
        windows = shuffled_index(places, self.num_sequences, seed=self._seed, shuffle=self._shuffle)
        starts = windows * self._context_length
        if self._stagger:
            epochs = places // self.num_sequences
            starts += epoch_offset(epochs, self._context_length, seed=self._seed)
        return dict(zip(positions, starts, strict=True))

    def _send(self, position: int) -> Tensor:
        """This rank's rows of the batch at `position`, (g, T + 1), on their way to the device."""
        batch = self._read.get(position)
        if self._stream is None:
            return batch.to(self._device)
        # Pinned here and not by the reader: nobody else may ask CUDA for memory while this
        # process records a graph.
        with torch.cuda.stream(self._stream):
            return batch.pin_memory().to(self._device, non_blocking=True)


def rank_rows(rank: int, world_size: int, global_batch: int) -> range:
    """Rows of a global batch that a rank learns: as even as can be, in order, none left out."""
    first = global_batch * rank // world_size
    return range(first, global_batch * (rank + 1) // world_size)


def count_sequences(tokens: int, context_length: int) -> int:
    """Whole windows in so many tokens, each with a target for its last token."""
    return max(0, (tokens - 1) // context_length)


def too_short_hint(tokens: int) -> str:
    """What to do about a text shorter than a window: a window has a token more to be foretold."""
    return f"use {f'--context_length {tokens - 1} at most, or ' if tokens > 1 else ''}more text"


def sequences_per_epoch(tokens: int, context_length: int, *, random_offset: bool) -> int:
    """Windows that an epoch has: as many in each, however late they start."""
    latest = context_length - 1 if random_offset else 0
    return count_sequences(tokens - latest, context_length)


def _numbers(span: range) -> NDArray[np.int64]:
    return np.arange(span.start, span.stop, span.step, dtype=np.int64)


def read_sequences(tokens: TokenDataset, starts: NDArray[np.int64], context_length: int) -> Tensor:
    """Windows with one token more, for the targets: (len(starts), T + 1) int64."""
    batch = np.empty((len(starts), context_length + 1), np.int64)
    for row, start in enumerate(starts.tolist()):
        batch[row] = tokens[start : start + context_length + 1]
    return torch.from_numpy(batch)
