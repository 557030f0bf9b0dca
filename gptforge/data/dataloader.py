"""Training batches: sequences of one token dataset in a resumable order, prefetched.

Shapes: B sequences in a global batch, b of them this rank's, T tokens in a sequence.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptforge.data.shuffle import epoch_offset, shuffled_index
from gptforge.data.token_dataset import TokenDataset

MAX_PREFETCH = 4  # batches: hides a disk that is slow for one of them
MAX_PREFETCH_BYTES = 2**26  # of all prefetched batches; one is always allowed
# Sequences whose order is computed at a time: for a few, the overhead of numpy's calls would exceed
# their work, and hold the GIL, which the steps of a small model need as well.
INDEX_CHUNK = 2048


class DataLoader:
    """Global batches without end; the only state is the position.

    Sequences start at 0, T, 2T, ... of the tokens, targets are shifted by one, and a last, partial
    sequence is dropped. With `random_offset`, all sequences of an epoch are shifted by a random
    number of tokens below T, so that each epoch cuts the text differently. A batch may span two
    epochs. All ranks count the same global batches and take their rows of each, so the number of
    ranks does not change which sequences a step trains on.

    Args:
        tokens: at least one sequence.
        context_length: T.
        global_batch_size: B.
        seed: picks the order, together with the epoch.
        shuffle: False keeps the order of the text.
        device: where batches go.
        random_offset: whether each epoch cuts the text differently.
        rank: this process, from 0.
        world_size: how many processes share a batch; at most B.
    """

    def __init__(
        self,
        tokens: TokenDataset,
        *,
        context_length: int,
        global_batch_size: int,
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
        assert self.num_sequences > 0, "the length of the text is checked earlier"
        assert 0 <= rank < world_size <= global_batch_size
        self.position = 0
        # Rows of a global batch that this rank trains on, split as evenly as possible.
        first, end = (global_batch_size * r // world_size for r in (rank, rank + 1))
        self.rows = range(first, end)
        self._tokens = tokens
        self._context_length = context_length
        self._global_batch_size = global_batch_size
        self._seed, self._shuffle, self._random_offset = seed, shuffle, random_offset
        self._device = device
        # Copies have their own CUDA stream, to overlap with computation.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        batch_bytes = 8 * len(self.rows) * (context_length + 1)
        self._depth = max(1, min(MAX_PREFETCH, MAX_PREFETCH_BYTES // batch_bytes))
        self._executor = ThreadPoolExecutor(1, "prefetch")
        self._prefetched: dict[int, Future[Tensor]] = {}  # by position
        self._on_device: Tensor | None = None
        # First tokens of sequences by the batch's position; only the prefetching thread uses it.
        self._starts: dict[int, NDArray[np.int64]] = {}

    @property
    def epoch(self) -> float:
        """Passes over the text, with the data that rollbacks skipped."""
        return self.position / self.num_sequences

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step, this rank's (b, T) int64 on the device."""
        batch = self._on_device if self._on_device is not None else self._to_device(self.position)
        self._on_device = None
        if self._copy_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copy_stream)
            batch.record_stream(torch.cuda.current_stream(self._device))
        self.position += self._global_batch_size
        return batch[:, :-1], batch[:, 1:]

    def prefetch_to_device(self) -> None:
        """Start to copy the next batch to the device.

        Call it when the current step has been launched, so that the device need not wait for it.
        """
        if self._on_device is None:
            self._on_device = self._to_device(self.position)

    def sequence_ids_at(self, position: int) -> list[int]:
        """Sequences of the whole global batch at a position.

        Sequence i starts at token i * T, plus the epoch's offset with `random_offset`.
        """
        positions = position + np.arange(self._global_batch_size, dtype=np.int64)
        ids = shuffled_index(positions, self.num_sequences, seed=self._seed, shuffle=self._shuffle)
        return [int(i) for i in ids]

    def state_dict(self) -> dict[str, int]:
        """The number of sequences consumed by all ranks together."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at another position, in constant time."""
        self.position = state["position"]
        self._on_device = None

    def close(self) -> None:
        """End the prefetching thread, after the batch that it is loading."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _load_batch(self, position: int) -> Tensor:
        """Sequences of the batch at a position with one more token, for the targets: (b, T + 1)."""
        if position not in self._starts:
            self._starts = self._sequence_starts(position)
        starts, length = self._starts.pop(position), self._context_length + 1
        batch = np.empty((len(starts), length), np.int64)
        for row, start in enumerate(starts.tolist()):
            batch[row] = self._tokens[start : start + length]
        return torch.from_numpy(batch)

    def _sequence_starts(self, position: int) -> dict[int, NDArray[np.int64]]:
        """First tokens of this rank's sequences in the batch at a position and some after it."""
        num_batches = -(-INDEX_CHUNK // len(self.rows))
        # NumPy 1 defaults to 32 bits on Windows, where positions would overflow.
        batches = position + self._global_batch_size * np.arange(num_batches, dtype=np.int64)
        positions = np.add.outer(batches, np.array(self.rows))
        ids = shuffled_index(positions, self.num_sequences, seed=self._seed, shuffle=self._shuffle)
        starts = ids * self._context_length
        if self._random_offset:
            epochs = positions // self.num_sequences
            starts += epoch_offset(epochs, self._context_length, seed=self._seed)
        return dict(zip(batches.tolist(), starts, strict=True))

    def _to_device(self, position: int) -> Tensor:
        """This rank's rows of the batch at a position, (b, T + 1), being copied to the device."""
        end = position + (self._depth + 1) * self._global_batch_size
        self._prefetched = {
            p: self._prefetched.get(p) or self._executor.submit(self._load_batch, p)
            for p in range(position, end, self._global_batch_size)
        }
        batch = self._prefetched.pop(position).result()
        if self._copy_stream is None:
            return batch.to(self._device)
        # Pinned here, not in the prefetching thread: no other thread may allocate CUDA memory
        # while this one captures a graph.
        with torch.cuda.stream(self._copy_stream):
            return batch.pin_memory().to(self._device, non_blocking=True)


def count_sequences(tokens: int, context_length: int) -> int:
    """Full sequences in a number of tokens, each with a target for its last token."""
    return max(0, (tokens - 1) // context_length)


def sequences_per_epoch(tokens: int, context_length: int, *, random_offset: bool) -> int:
    """Full sequences in an epoch, whatever its offset."""
    max_offset = context_length - 1 if random_offset else 0
    return count_sequences(tokens - max_offset, context_length)


def too_short_hint(tokens: int) -> str:
    """What to do about a text shorter than a sequence and its last target."""
    return f"use {f'--context_length {tokens - 1} at most, or ' if tokens > 1 else ''}more text"


def replace_tokens(tokens: Tensor, probability: float) -> Tensor:
    """Replace tokens at random by others of the batch.

    Replacements have the frequencies of the text, which regularizes better than uniform ones (Xie
    et al., "Data noising as smoothing in neural network language models", 2017).
    """
    is_replaced = torch.rand(tokens.shape, device=tokens.device) < probability
    others = torch.randint(tokens.numel(), tokens.shape, device=tokens.device)
    return torch.where(is_replaced, tokens.flatten()[others], tokens)
