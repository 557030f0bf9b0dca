"""Writing a batch of sequences step by step, in memory that is laid out beforehand.

All that a step reads and writes stays on the device in the same place, so that on a GPU one step is
captured as a CUDA graph and replayed: a few hundred small kernels then cost one call.

Shapes: B sequences, S slots of the cache, N tokens to write, A alternatives.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gptforge.generate.engine import Engine
from gptforge.generate.quick import QuickStep, quick_step
from gptforge.generate.sampling import Sampling, pick

WARM_UP = 3
"""Steps before a capture: libraries set themselves up in the first, outside the graph."""


class Session:
    """Room for B sequences.

    Args:
        engine: what computes.
        batch: sequences, B.
        slots: tokens that the longest of them may come to, S.
        steps: tokens to write at most, N.
        sampling: how they are chosen.
        alternatives: likeliest tokens to note beside each chosen one, A; None: no probabilities.
        captured: replay steps as a CUDA graph; where that fails they run one by one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch: int,
        slots: int,
        steps: int,
        sampling: Sampling,
        alternatives: int | None = None,
        captured: bool = False,
    ) -> None:
        self.engine, self.sampling, self.alternatives = engine, sampling, alternatives
        device = engine.device
        self.cache = engine.cache(batch, slots)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.starts = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.dice = torch.zeros(batch, steps, device=device)
        columns = 1 + (alternatives or 0)
        # Column 0 is what was chosen, the others what was likeliest.
        self.chosen = torch.zeros(batch, steps, columns, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(batch, steps, columns, device=device)
        self._all_slots = torch.arange(slots, device=device)
        self._used = 0
        self._padded = False
        self._graph = self._capture() if captured and device.type == "cuda" else None

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._graph is not None

    def begin(self, dice: Tensor) -> None:
        """Start over, with other dice, (B, N)."""
        self.step.zero_()
        self.dice[:, : dice.size(1)] = dice.to(self.dice.device)

    def read(self, windows: Sequence[Sequence[int]]) -> None:
        """Read the sequences afresh, each of them not empty, and choose the token behind each."""
        longest = max(len(window) for window in windows)
        padding = [longest - len(window) for window in windows]
        rows = [[0] * pad + list(window) for pad, window in zip(padding, windows, strict=True)]
        device = self.engine.device
        ids = torch.tensor(rows).to(device)
        self.starts.copy_(torch.tensor(padding)[:, None])
        self._used, self._padded = longest, any(padding)
        slots = self._all_slots[:longest]
        mask = None
        if self._padded:
            # A pad looks at itself: a row that looked at nothing would turn into NaN.
            key, query = slots[None, None, :], slots[None, :, None]
            seen = ((key <= query) & (key >= self.starts[:, :, None])) | (key == query)
            mask = self._additive(seen)
        cache = self.cache[..., :longest, :]
        positions = (slots[None] - self.starts).clamp(min=0)
        self._choose(self.engine.forward(ids, positions, cache, slots, mask))
        self.slot.fill_(longest)

    def advance(self, steps: int) -> None:
        """Read what was chosen last and choose the next; on a GPU this does not wait for it."""
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance(self._used + 1, padded=self._padded)
            self._used += 1

    def taken(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Ids and natural log probabilities of steps first .. last-1, both (B, n, 1 + A)."""
        return self.chosen[:, first:last].cpu(), self.logprobs[:, first:last].cpu()

    def _advance(self, visible: int, *, padded: bool) -> None:
        """One step that looks at the first `visible` slots, masked if padded or not all used."""
        mask = None
        if padded:
            slots = self._all_slots[None, :visible]
            seen = (slots <= self.slot) & (slots >= self.starts)  # (B, visible)
            mask = self._additive(seen[:, None])
        cache = self.cache[..., :visible, :]
        positions = self.slot - self.starts
        self._choose(self.engine.forward(self.ids, positions, cache, self.slot, mask))
        self.slot += 1

    def _captured_step(self, quick: QuickStep | None) -> None:
        """One step over all slots, which a graph can hold."""
        if quick is None:
            self._advance(self.cache.size(-2), padded=True)
            return
        self._choose(quick(self.ids, self.starts, self.cache, self.slot))
        self.slot += 1

    def _choose(self, logits: Tensor) -> None:
        dice = self.dice.index_select(1, self.step).squeeze(1)
        ids = pick(logits, dice, self.sampling)[:, None]  # (B, 1)
        self.ids.copy_(ids)
        if self.alternatives is not None:
            known = logits.float().log_softmax(-1)
            if self.alternatives:
                ids = torch.cat([ids, known.topk(self.alternatives).indices], 1)
            self.logprobs.index_copy_(1, self.step, known.gather(1, ids)[:, None])
        self.chosen.index_copy_(1, self.step, ids[:, None])
        self.step += 1

    def _additive(self, seen: Tensor) -> Tensor:
        """(B, T, S) booleans as a mask for all heads, (B, 1, T, S)."""
        mask = torch.zeros(seen.shape, dtype=self.engine.cache_dtype, device=seen.device)
        return mask.masked_fill(~seen, float("-inf"))[:, None]

    def _capture(self) -> "torch.cuda.CUDAGraph | None":
        """One step over all slots as a graph, or None where the system will not have it."""
        quick = quick_step(self.engine, self.cache)
        graph = None if quick is None else self._captured(quick)
        return graph or self._captured(None)

    def _captured(self, quick: QuickStep | None) -> "torch.cuda.CUDAGraph | None":
        try:
            side = torch.cuda.Stream(self.engine.device)
            side.wait_stream(torch.cuda.current_stream(self.engine.device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self.slot.zero_()
                    self.step.zero_()
                    self._captured_step(quick)
            torch.cuda.current_stream(self.engine.device).wait_stream(side)
            self.slot.zero_()
            self.step.zero_()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: only this one's mistakes count.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._captured_step(quick)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.engine.device)
            return None
        return graph
