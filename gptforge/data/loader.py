"""Batches for training: windows of one token array, in a resumable order, one batch ahead.

Shapes: G windows in a global batch, T tokens in a window.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from gptforge.data.order import window_at
from gptforge.tokenizers import Tokens


class Loader:
    """An endless stream of global batches; its position is its whole state.

    Windows start at 0, T, 2T, ... of the tokens, targets lie one further on, and a last, partial
    window is dropped. A batch may reach from one epoch into the next.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        context_length: int,
        global_batch: int,
        seed: int,
        shuffle: bool,
        device: torch.device,
    ) -> None:
        self.windows = count_windows(len(tokens), context_length)
        assert self.windows > 0, "the text's length is checked before a loader is built"
        self.position = 0
        self._tokens = tokens
        self._context_length = context_length
        self._global_batch = global_batch
        self._seed = seed
        self._shuffle = shuffle
        self._device = device
        # Copies travel on a stream of their own, beside the computation.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Tensor | None = None

    @property
    def epoch(self) -> float:
        """How many times the text has been seen so far."""
        return self.position / self.windows

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next update, each (G, T) int64 on the device.

        The batch after it sets out at once, to arrive while this one is computed on.
        """
        batch = self._ahead if self._ahead is not None else self._send(self.position)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            batch.record_stream(torch.cuda.current_stream(self._device))
        self.position += self._global_batch
        self._ahead = self._send(self.position)
        return batch[:, :-1], batch[:, 1:]

    def windows_at(self, position: int) -> list[int]:
        """Numbers of the windows in the batch at a position; window w starts at token w * T."""
        places = np.arange(position, position + self._global_batch, dtype=np.int64)
        chosen = window_at(places, self.windows, seed=self._seed, shuffle=self._shuffle)
        return [int(window) for window in chosen]

    def state_dict(self) -> dict[str, int]:
        """Windows handed out so far."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a position, in constant time."""
        self.position = state["position"]
        self._ahead = None

    def _send(self, position: int) -> Tensor:
        """The batch at `position`, (G, T + 1), on its way to the device."""
        chosen = np.array(self.windows_at(position), np.int64)
        batch = gather(self._tokens, chosen, self._context_length)
        if self._stream is None:
            return batch.to(self._device)
        with torch.cuda.stream(self._stream):
            return batch.pin_memory().to(self._device, non_blocking=True)


def count_windows(tokens: int, context_length: int) -> int:
    """Whole windows in so many tokens, each with a target for its last token."""
    return max(0, (tokens - 1) // context_length)


def gather(tokens: Tokens, windows: np.ndarray, context_length: int) -> Tensor:
    """The given windows with one token more, for the targets: (len(windows), T + 1) int64."""
    index = windows[:, None] * context_length + np.arange(context_length + 1)
    return torch.from_numpy(tokens[index].astype(np.int64))
