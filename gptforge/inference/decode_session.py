"""Prefill and decode steps of a batch, in buffers allocated once.

All inputs and outputs of a step stay at fixed addresses on the device, so that on a GPU it can be
captured as a CUDA graph: one launch for a few hundred small kernels.

Shapes: B sequences, S cache slots, N new tokens, A alternatives (`top_logprobs`).
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from gptforge.cuda_capture import cuda_graph_capture
from gptforge.device import copy_to_host_async
from gptforge.inference.fused_decode import FusedDecode, build_fused_decode
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, sample
from gptforge.kernels.decode import DecodeInputs
from gptforge.kernels.launch import next_power_of_2
from gptforge.kernels.sampling import sample_top_k, supports_sample_top_k

WARMUP_STEPS = 3
"""Steps before the capture: the first initializes libraries, which cannot be captured."""
MAX_GRAPH_PREFILL = 2048
"""Longest prefill to capture; for longer ones, computing takes longer than launching kernels."""


class DecodeSession:
    """Buffers and KV cache for `batch_size` sequences of at most `max_seq_length` tokens.

    `max_new_tokens` of these are new. With `top_logprobs`, log probabilities are returned, too.
    Decode steps and repeated short prefills are replayed as CUDA graphs if these can be captured.
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
        # First slot of each sequence: the length of its left padding.
        self.starts = torch.zeros_like(self.ids)
        # Together, so that one kernel advances both.
        self._counters = torch.zeros(2, dtype=torch.long, device=device)
        self.step, self.cache_position = self._counters.split(1)
        self.uniforms = torch.zeros(batch_size, max_new_tokens, device=device)
        # Column 0 is the sampled token, the others are the most likely ones.
        shape = (batch_size, max_new_tokens, 1 + (top_logprobs or 0))
        self.token_ids = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self._slots = torch.arange(max_seq_length, device=device)
        self._prompt_ids = torch.zeros(batch_size, max_seq_length, dtype=torch.long, device=device)
        self._last = torch.zeros(1, dtype=torch.long, device=device)
        # By padded length; None until there is one.
        self._prefill_graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._length = 0
        self._is_padded = False
        # Greedy decoding is top-1.
        self._top_k = sampling.top_k if sampling.temperature else 1
        self._samples_top_k = cuda_graph and top_logprobs is None and self._can_sample_top_k()
        self._graph = self._capture_decode() if cuda_graph and device.type == "cuda" else None
        self.has_cuda_graph = self._graph is not None

    def reset(self, uniforms: Tensor) -> None:
        """Start at step 0 with the random numbers (B, N) to sample with."""
        self.step.zero_()
        self.uniforms[:, : uniforms.size(1)] = uniforms.to(self.uniforms.device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fill the cache from B non-empty prompts and sample the first token of each."""
        length = max(len(prompt) for prompt in prompts)
        padding = [length - len(prompt) for prompt in prompts]
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        ids = torch.tensor(rows).to(self.model.device)
        self.starts.copy_(torch.tensor(padding)[:, None])
        self._length, self._is_padded = length, any(padding)
        padded = min(next_power_of_2(length), len(self._slots))
        if self._graph is None or self._is_padded or padded * len(rows) > MAX_GRAPH_PREFILL:
            slots, mask = self._slots[:length], None
            if self._is_padded:
                # Padding attends to itself: softmax over no slots at all is NaN.
                key, query = slots[None, None, :], slots[None, :, None]
                visible = ((key <= query) & (key >= self.starts[:, :, None])) | (key == query)
                mask = self._additive_mask(visible)
            position_ids = (slots[None] - self.starts).clamp(min=0)
            cache = self.cache.prefix(length)
            self._sample(self.model.forward(ids, position_ids, cache, slots, mask))
        else:
            self._prompt_ids[:, :length] = ids
            self._last.fill_(length - 1)
            self._prefill_padded(padded)
        self.cache_position.fill_(length)

    def decode(self, steps: int) -> None:
        """Run decode steps of one token per sequence, without waiting for a GPU."""
        for _ in range(steps):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._decode_one_token(self._length + 1, use_mask=self._is_padded)
            self._length += 1

    def read_tokens(self, first: int, last: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start copying the results of steps first to last - 1; returns a function that waits.

        They are ids and log probabilities, both (B, n, 1 + A).
        """
        ids = copy_to_host_async(self.token_ids[:, first:last])
        logprobs = copy_to_host_async(self.logprobs[:, first:last])
        return lambda: (ids(), logprobs())

    def _decode_one_token(self, length: int, *, use_mask: bool) -> None:
        """One step over the first `length` slots, masked if there is padding or unused slots."""
        mask = None
        if use_mask:
            slots = self._slots[None, :length]
            visible = (slots <= self.cache_position) & (slots >= self.starts)  # (B, length)
            mask = self._additive_mask(visible[:, None])
        position_ids = self.cache_position - self.starts
        cache = self.cache.prefix(length)
        self._sample(self.model.forward(self.ids, position_ids, cache, self.cache_position, mask))

    def _static_step(self, fused: FusedDecode | None) -> None:
        """One step over all slots: a CUDA graph needs the same shapes in each step."""
        if fused is None:
            self._decode_one_token(len(self._slots), use_mask=True)
            return
        self._sample(fused(self.cache, DecodeInputs(self.ids, self.starts, self.cache_position)))

    def _prefill_padded(self, length: int) -> None:
        """Prefill of prompts padded on the right to a power of two, so that few graphs serve all.

        Attention is causal: padding only affects slots that decode steps write before they read
        them. A graph is captured at the second prefill of a length: a single use would not pay off.
        """
        step = partial(self._static_prefill, length)
        graph = None
        if length in self._prefill_graphs:
            graph = self._prefill_graphs[length] or self._capture(step)
        self._prefill_graphs[length] = graph
        if graph is None:
            step()
        else:
            graph.replay()

    def _static_prefill(self, length: int) -> None:
        """Prefill of the first `length` columns of the prompts, up to `self._last`."""
        slots, cache = self._slots[:length], self.cache.prefix(length)
        ids = self._prompt_ids[:, :length]
        self._sample(self.model.forward(ids, slots[None], cache, slots, None, last=self._last))

    def _sample(self, logits: Tensor) -> None:
        """Sample the token of this step, and advance the counters."""
        if self._samples_top_k:
            self._sample_top_k(logits)
            return
        # Indexed by a tensor on the device: an int would be fixed in the captured graph.
        uniforms = self.uniforms.index_select(1, self.step).squeeze(1)  # (B,)
        ids = sample(logits, uniforms, self.sampling)[:, None]  # (B, 1)
        self.ids.copy_(ids)
        if self.top_logprobs is not None:
            logprobs = logits.float().log_softmax(-1)
            if self.top_logprobs:
                ids = torch.cat([ids, logprobs.topk(self.top_logprobs).indices], 1)
            self.logprobs.index_copy_(1, self.step, logprobs.gather(1, ids)[:, None])
        self.token_ids.index_copy_(1, self.step, ids[:, None])
        self._counters += 1

    def _sample_top_k(self, logits: Tensor) -> None:
        sample_top_k(
            logits, self.uniforms, self._counters, ids=self.ids, token_ids=self.token_ids,
            temperature=self.sampling.temperature or 1.0, top_k=self._top_k,
            top_p=self.sampling.top_p,
        )  # fmt: skip

    def _can_sample_top_k(self) -> bool:
        """Whether the fused sampler supports these settings, compiles, and agrees with `sample`."""
        device, shape = self.model.device, (len(self.ids), self.model.vocab_size)
        if not supports_sample_top_k(device, shape[1], self._top_k):
            return False
        logits = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
        self.uniforms.fill_(0.5)
        try:
            self._sample_top_k(logits)
        except Exception:
            return False  # no Triton, no C compiler, an unknown GPU
        return torch.equal(self.ids[:, 0], sample(logits, self.uniforms[:, 0], self.sampling))

    def _additive_mask(self, visible: Tensor) -> Tensor:
        """(B, T, S) booleans to 0 and -inf, (B, 1, T, S)."""
        mask = torch.zeros(visible.shape, dtype=self.model.cache_dtype, device=visible.device)
        return mask.masked_fill(~visible, float("-inf"))[:, None]

    def _capture_decode(self) -> "torch.cuda.CUDAGraph | None":
        """A graph of the fastest step that can be captured, or None."""
        fused = build_fused_decode(self.model, self.cache)
        graph = None if fused is None else self._capture(partial(self._static_step, fused))
        return graph or self._capture(partial(self._static_step, None))

    def _capture(self, step: Callable[[], None]) -> "torch.cuda.CUDAGraph | None":
        """A graph of `step`, or None; the counters stay."""
        device, counters = self.model.device, self._counters.clone()
        try:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    step()
                    self._counters.copy_(counters)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with cuda_graph_capture(graph):
                step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            with suppress(RuntimeError):
                torch.cuda.synchronize(device)
            return None
        return graph
