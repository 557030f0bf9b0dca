"""Writing a batch of sequences step by step, in memory that is laid out beforehand.

All that a step reads and writes stays on the device in the same place, so that on a GPU one step is
captured as a CUDA graph and replayed: a few hundred small kernels then cost one call.

Shapes: B sequences, S slots of the cache, N tokens to write, A alternatives.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from gptforge.inference.fused_decode import FusedDecode, build_fused_decode
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, sample

WARMUP_STEPS = 3
"""Steps before a capture: libraries set themselves up in the first, outside the graph."""


class DecodeSession:
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
        model: InferenceModel,
        *,
        batch_size: int,
        max_seq_length: int,
        max_new_tokens: int,
        sampling: SamplingParams,
        top_logprobs: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.model, self.sampling, self.top_logprobs = model, sampling, top_logprobs
        device = model.device
        self.cache = model.allocate_cache(batch_size, max_seq_length)
        self.ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.starts = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.cache_position = torch.zeros(1, dtype=torch.long, device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(batch_size, max_new_tokens, device=device)
        columns = 1 + (top_logprobs or 0)
        # Column 0 is what was chosen, the others what was likeliest.
        self.token_ids = torch.zeros(
            batch_size, max_new_tokens, columns, dtype=torch.long, device=device
        )
        self.logprobs = torch.zeros(batch_size, max_new_tokens, columns, device=device)
        self._all_slots = torch.arange(max_seq_length, device=device)
        self._used = 0
        self._padded = False
        self._graph = self._capture() if cuda_graph and device.type == "cuda" else None

    @property
    def has_cuda_graph(self) -> bool:
        """Whether steps are replayed as a CUDA graph."""
        return self._graph is not None

    def reset(self, uniforms: Tensor) -> None:
        """Start over, with other dice, (B, N)."""
        self.step.zero_()
        self.uniforms[:, : uniforms.size(1)] = uniforms.to(self.uniforms.device)

    def prefill(self, windows: Sequence[Sequence[int]]) -> None:
        """Read the sequences afresh, each of them not empty, and choose the token behind each."""
        longest = max(len(window) for window in windows)
        padding = [longest - len(window) for window in windows]
        rows = [[0] * pad + list(window) for pad, window in zip(padding, windows, strict=True)]
        device = self.model.device
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
        self._choose(self.model.forward(ids, positions, cache, slots, mask))
        self.cache_position.fill_(longest)

    def decode(self, steps: int) -> None:
        """Read what was chosen last and choose the next; on a GPU this does not wait for it."""
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._advance(self._used + 1, padded=self._padded)
            self._used += 1

    def read_tokens(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Ids and natural log probabilities of steps first .. last-1, both (B, n, 1 + A)."""
        return self.token_ids[:, first:last].cpu(), self.logprobs[:, first:last].cpu()

    def _advance(self, visible: int, *, padded: bool) -> None:
        """One step that looks at the first `visible` slots, masked if padded or not all used."""
        mask = None
        if padded:
            slots = self._all_slots[None, :visible]
            seen = (slots <= self.cache_position) & (slots >= self.starts)  # (B, visible)
            mask = self._additive(seen[:, None])
        cache = self.cache[..., :visible, :]
        positions = self.cache_position - self.starts
        self._choose(self.model.forward(self.ids, positions, cache, self.cache_position, mask))
        self.cache_position += 1

    def _captured_step(self, quick: FusedDecode | None) -> None:
        """One step over all slots, which a graph can hold."""
        if quick is None:
            self._advance(self.cache.size(-2), padded=True)
            return
        self._choose(quick(self.ids, self.starts, self.cache, self.cache_position))
        self.cache_position += 1

    def _choose(self, logits: Tensor) -> None:
        dice = self.uniforms.index_select(1, self.step).squeeze(1)
        ids = sample(logits, dice, self.sampling)[:, None]  # (B, 1)
        self.ids.copy_(ids)
        if self.top_logprobs is not None:
            known = logits.float().log_softmax(-1)
            if self.top_logprobs:
                ids = torch.cat([ids, known.topk(self.top_logprobs).indices], 1)
            self.logprobs.index_copy_(1, self.step, known.gather(1, ids)[:, None])
        self.token_ids.index_copy_(1, self.step, ids[:, None])
        self.step += 1

    def _additive(self, seen: Tensor) -> Tensor:
        """(B, T, S) booleans as a mask for all heads, (B, 1, T, S)."""
        mask = torch.zeros(seen.shape, dtype=self.model.cache_dtype, device=seen.device)
        return mask.masked_fill(~seen, float("-inf"))[:, None]

    def _capture(self) -> "torch.cuda.CUDAGraph | None":
        """One step over all slots as a graph, or None where the system will not have it."""
        quick = build_fused_decode(self.model, self.cache)
        graph = None if quick is None else self._captured(quick)
        return graph or self._captured(None)

    def _captured(self, quick: FusedDecode | None) -> "torch.cuda.CUDAGraph | None":
        try:
            side = torch.cuda.Stream(self.model.device)
            side.wait_stream(torch.cuda.current_stream(self.model.device))
            with torch.cuda.stream(side):
                for _ in range(WARMUP_STEPS):
                    self.cache_position.zero_()
                    self.step.zero_()
                    self._captured_step(quick)
            torch.cuda.current_stream(self.model.device).wait_stream(side)
            self.cache_position.zero_()
            self.step.zero_()
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile: only this one's mistakes count.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._captured_step(quick)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with suppress(RuntimeError):
                torch.cuda.synchronize(self.model.device)
            return None
        return graph
