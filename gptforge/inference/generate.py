"""Generate token ids: prefill, decode, and shift the context window when it is full."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptforge.inference.decode_session import DecodeSession
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams

DECODE_CHUNK = 16
"""Decode steps between two reads of the tokens on a GPU; a read takes a third of a step."""
CACHE_MULTIPLE = 64
"""The cache length is rounded up to a multiple of this, a tile of the attention kernels."""
GRAPH_STEP_MULTIPLE = 256
"""Steps are rounded up to a multiple of this, so that more calls can reuse a graph."""


@dataclass(frozen=True)
class SampledTokens:
    """Results of n steps for B sequences, with A alternatives per token."""

    ids: list[list[int]]  # (B, n), sampled
    logprobs: Tensor  # (B, n, 1 + A) natural logarithms: of the sampled token, then of `top_ids`
    top_ids: Tensor  # (B, n, A), most likely first


class TokenGenerator:
    """Continues prompts; keeps the last session for reuse if it has a CUDA graph."""

    def __init__(self, model: InferenceModel, *, cuda_graph: bool = False) -> None:
        self.model = model
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self._idle: tuple[object, DecodeSession] | None = None

    @property
    def has_cuda_graph(self) -> bool:
        """Whether the last session has a CUDA graph that a call of the same shape can reuse."""
        return self._idle is not None

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        sampling: SamplingParams,
        *,
        top_logprobs: int | None = None,
        on_context_shift: Callable[[], None] = lambda: None,
    ) -> Iterator[SampledTokens]:
        """Yield N new tokens per prompt, some steps at a time.

        Args:
            prompts: B non-empty lists of ids.
            uniforms: (B, N), from `draw_uniforms`.
            sampling: temperature, top-k and top-p.
            top_logprobs: most likely tokens to return per position; None: no log probabilities.
            on_context_shift: called when a sequence first exceeds the model's context.
        """
        sequences, steps = [list(prompt) for prompt in prompts], uniforms.size(1)
        if not steps:
            return
        max_length = _round_up(max(map(len, sequences)) + steps, CACHE_MULTIPLE)
        key: dict[str, Any] = {
            "batch_size": len(prompts),
            "max_seq_length": min(max_length, self.model.config.block_size),
            "max_new_tokens": _round_up(steps, GRAPH_STEP_MULTIPLE) if self.cuda_graph else steps,
            "sampling": sampling,
            "top_logprobs": top_logprobs,
        }
        # Taken out rather than shared, since two threads may generate at the same time.
        idle, self._idle = self._idle, None
        if idle is not None and idle[0] == key:
            session = idle[1]
        else:
            session = DecodeSession(self.model, **key, cuda_graph=self.cuda_graph)
        session.reset(uniforms)
        # A caller that stops early, at the end of a document, leaves a session that can be reused.
        with suppress(GeneratorExit):
            yield from self._generate(session, sequences, steps, on_context_shift)
        self._idle = (key, session) if session.has_cuda_graph else None

    def _generate(
        self,
        session: DecodeSession,
        sequences: list[list[int]],
        steps: int,
        on_context_shift: Callable[[], None],
    ) -> Iterator[SampledTokens]:
        """Yield tokens as they are appended to the sequences; a full window is shifted."""
        block_size = self.model.config.block_size
        starts = [0] * len(sequences)
        done, has_shifted = 0, False
        while done < steps:
            shifted = [
                window_start(start, len(ids), block_size)
                for start, ids in zip(starts, sequences, strict=True)
            ]
            if shifted != starts and not has_shifted:
                on_context_shift()
                has_shifted = True
            starts = shifted
            windows = [ids[start:] for start, ids in zip(starts, sequences, strict=True)]
            session.prefill(windows)
            # One token from the prefill, then until the longest window is full.
            end = min(steps, done + 1 + block_size - max(map(len, windows)))
            for tokens in self._decode(session, done, end):
                for sequence, row in zip(sequences, tokens.ids, strict=True):
                    sequence += row
                yield tokens
            done = end

    def _decode(self, session: DecodeSession, first: int, last: int) -> Iterator[SampledTokens]:
        """Yield steps `first`, which is the prefill's, to `last` - 1."""
        # To keep a GPU busy, the next steps are queued before the tokens of these are read.
        on_gpu = self.model.device.type == "cuda"
        chunk, max_reads = (DECODE_CHUNK, 2) if on_gpu else (1, 1)
        queued = first + 1
        reads = deque([session.read_tokens(first, queued)])
        while reads or queued < last:
            while queued < last and len(reads) < max_reads:
                count = min(last - queued, chunk)
                session.decode(count)
                reads.append(session.read_tokens(queued, queued + count))
                queued += count
            ids, logprobs = reads.popleft()()
            yield SampledTokens(ids[:, :, 0].tolist(), logprobs, ids[:, :, 1:])


def window_start(start: int, length: int, block_size: int) -> int:
    """The new start of the context window of a sequence of `length` ids, which was `start`.

    Position embeddings are absolute, so a shifted window needs a new prefill. To keep prefills
    rare, a full window shifts by a quarter of `block_size`, not by one token.
    """
    return start if length - start <= block_size else length - (block_size - block_size // 4)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
