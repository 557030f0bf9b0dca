"""From prompts to tokens: reads them, writes on, and moves the window where the context ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptforge.inference.decode_session import DecodeSession
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams

DECODE_CHUNK = 16
"""Steps handed to a GPU before it is waited for: waiting for each would leave it idle between."""
CACHE_MULTIPLE = 64
"""The cache comes in multiples of so many slots, which suits the attention kernels."""


@dataclass(frozen=True)
class SampledTokens:
    """Some steps of a batch: B sequences, n steps, A alternatives."""

    ids: list[list[int]]
    """(B, n) what was chosen."""
    logprobs: Tensor
    """(B, n, 1 + A) natural logarithms: of what was chosen, then of the likeliest, in order."""
    top_ids: Tensor
    """(B, n, A) ids."""


class TokenGenerator:
    """Writes on from prompts; keeps the last session, whose captured graph is worth keeping.

    Args:
        engine: what computes.
        captured: replay steps as CUDA graphs where there is CUDA.
    """

    def __init__(self, model: InferenceModel, *, cuda_graph: bool = False) -> None:
        self.model = model
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self._idle: tuple[object, DecodeSession] | None = None

    @property
    def has_cuda_graph(self) -> bool:
        """Whether the last session was captured, and waits for the next call like it."""
        return self._idle is not None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        uniforms: Tensor,
        sampling: SamplingParams,
        *,
        top_logprobs: int | None = None,
        on_context_shift: Callable[[], None] = lambda: None,
    ) -> Iterator[SampledTokens]:
        """Write a token for each column of `dice`, (B, N), some steps at a time.

        Args:
            prompts: ids, B rows of any lengths above 0.
            dice: as `throw_dice` gives them.
            sampling: how tokens are chosen.
            alternatives: likeliest tokens to give beside each; None: no probabilities.
            on_slide: called when a sequence first passes the model's positions.
        """
        rows, steps, block = [list(row) for row in prompts], uniforms.size(1), self._block
        starts = [0] * len(rows)
        session, key = self._session(rows, steps, sampling, top_logprobs)
        with torch.inference_mode():
            session.reset(uniforms)
        done, has_slid = 0, False
        while done < steps:
            moved = [window_start(s, len(row), block) for s, row in zip(starts, rows, strict=True)]
            if moved != starts and not has_slid:
                on_context_shift()
                has_slid = True
            starts = moved
            windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
            with torch.inference_mode():
                session.prefill(windows)
            written, room = 1, block - max(len(window) for window in windows)
            until = min(steps - done, 1 + room)
            while True:
                chosen = _chosen(session, done, done + written, top_logprobs)
                for row, ids in zip(rows, chosen.ids, strict=True):
                    row += ids
                done, until = done + written, until - written
                yield chosen
                if not until:
                    break
                written = min(until, DECODE_CHUNK if self.model.device.type == "cuda" else 1)
                with torch.inference_mode():
                    session.decode(written)
        self._idle = (key, session) if session.has_cuda_graph else None

    @property
    def _block(self) -> int:
        return self.model.config.block_size

    def _session(
        self,
        rows: Sequence[Sequence[int]],
        steps: int,
        sampling: SamplingParams,
        alternatives: int | None,
    ) -> tuple[DecodeSession, object]:
        longest = min(max(map(len, rows)) + steps, self._block)
        slots = min(-(-longest // CACHE_MULTIPLE) * CACHE_MULTIPLE, self._block)
        if self.cuda_graph:
            steps = -(-steps // 256) * 256
        key = (len(rows), slots, steps, sampling, alternatives)
        # Taken, not shared: two threads may write at once.
        idle, self._idle = self._idle, None
        if idle is not None and idle[0] == key:
            return idle[1], key
        with torch.inference_mode():
            session = DecodeSession(
                self.model,
                batch_size=len(rows),
                max_seq_length=slots,
                max_new_tokens=steps,
                sampling=sampling,
                top_logprobs=alternatives,
                cuda_graph=self.cuda_graph,
            )
        return session, key


def window_start(start: int, length: int, block_size: int) -> int:
    """Where in a sequence of `length` ids the window begins that began at `start`.

    Positions are learned for each place, so a window cannot move without being read anew. It stays
    until its `block` positions are used up, then leaves the older quarter behind.
    """
    return start if length - start <= block_size else length - (block_size - block_size // 4)


def _chosen(
    session: DecodeSession, first: int, last: int, alternatives: int | None
) -> SampledTokens:
    ids, logprobs = session.read_tokens(first, last)
    return SampledTokens(ids[:, :, 0].tolist(), logprobs, ids[:, :, 1:])
