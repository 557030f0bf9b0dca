"""A micro-batch's kernels recorded once and played back: a CUDA graph.

In a small model a kernel takes less time than it takes Python to ask for it. A recording is asked
for as a whole. It plays back at the same addresses: so the batch is copied to where that one was,
and gradients go where those went.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gptforge.train.by_hand import ByHand


class Replay:
    """`by_hand`, recorded at its second call with a shape: the first one warms everything up."""

    def __init__(self, by_hand: ByHand) -> None:
        self._by_hand = by_hand
        self._scale = torch.zeros((), device=by_hand.gradients.flat.device)
        self._recorded: dict[torch.Size, Callable[[Tensor, Tensor], Tensor]] = {}
        self._seen: set[torch.Size] = set()

    def begin(self) -> None:
        """As `ByHand.begin`."""
        self._by_hand.begin()

    def clip(self, longest: float) -> Tensor:
        """As `ByHand.clip`."""
        return self._by_hand.clip(longest)

    def __call__(self, idx: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `ByHand.__call__`."""
        if idx.shape not in self._seen:
            self._seen.add(idx.shape)
            return self._by_hand(idx, targets, scale)
        self._scale.fill_(scale)
        if idx.shape not in self._recorded:
            self._recorded[idx.shape] = self._record(idx, targets)
        return self._recorded[idx.shape](idx, targets)

    def forget(self) -> None:
        """Give the recordings' memory back."""
        self._recorded.clear()
        self._seen.clear()

    def _record(self, idx: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        fixed_idx, fixed_targets = idx.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        # Another thread may be writing a checkpoint, and ask for memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss = self._by_hand(fixed_idx, fixed_targets, self._scale)

        def play(idx: Tensor, targets: Tensor) -> Tensor:
            fixed_idx.copy_(idx)
            fixed_targets.copy_(targets)
            graph.replay()
            return loss.clone()

        return play
