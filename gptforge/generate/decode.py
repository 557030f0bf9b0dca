"""From prompts to tokens: reads them, writes on, and moves the window where the context ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptforge.generate.engine import Engine
from gptforge.generate.sampling import Sampling
from gptforge.generate.session import Session

AHEAD = 16
"""Steps handed to a GPU before it is waited for: waiting for each would leave it idle between."""
SLOTS = 64
"""The cache comes in multiples of so many slots, which suits the attention kernels."""


@dataclass(frozen=True)
class Chosen:
    """Some steps of a batch: B sequences, n steps, A alternatives."""

    ids: list[list[int]]
    """(B, n) what was chosen."""
    logprobs: Tensor
    """(B, n, 1 + A) natural logarithms: of what was chosen, then of the likeliest, in order."""
    likeliest: Tensor
    """(B, n, A) ids."""


class Decoder:
    """Writes on from prompts; keeps the last session, whose captured graph is worth keeping.

    Args:
        engine: what computes.
        captured: replay steps as CUDA graphs where there is CUDA.
    """

    def __init__(self, engine: Engine, *, captured: bool = False) -> None:
        self.engine = engine
        self.captured = captured and engine.device.type == "cuda"
        self._idle: tuple[object, Session] | None = None

    @property
    def keeps_a_graph(self) -> bool:
        """Whether the last session was captured, and waits for the next call like it."""
        return self._idle is not None

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        dice: Tensor,
        sampling: Sampling,
        *,
        alternatives: int | None = None,
        on_slide: Callable[[], None] = lambda: None,
    ) -> Iterator[Chosen]:
        """Write a token for each column of `dice`, (B, N), some steps at a time.

        Args:
            prompts: ids, B rows of any lengths above 0.
            dice: as `throw_dice` gives them.
            sampling: how tokens are chosen.
            alternatives: likeliest tokens to give beside each; None: no probabilities.
            on_slide: called when a sequence first passes the model's positions.
        """
        rows, steps, block = [list(row) for row in prompts], dice.size(1), self._block
        starts = [0] * len(rows)
        session, key = self._session(rows, steps, sampling, alternatives)
        with torch.inference_mode():
            session.begin(dice)
        done, has_slid = 0, False
        while done < steps:
            moved = [window_start(s, len(row), block) for s, row in zip(starts, rows, strict=True)]
            if moved != starts and not has_slid:
                on_slide()
                has_slid = True
            starts = moved
            windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
            with torch.inference_mode():
                session.read(windows)
            written, room = 1, block - max(len(window) for window in windows)
            until = min(steps - done, 1 + room)
            while True:
                chosen = _chosen(session, done, done + written, alternatives)
                for row, ids in zip(rows, chosen.ids, strict=True):
                    row += ids
                done, until = done + written, until - written
                yield chosen
                if not until:
                    break
                written = min(until, AHEAD if self.engine.device.type == "cuda" else 1)
                with torch.inference_mode():
                    session.advance(written)
        self._idle = (key, session) if session.is_captured else None

    @property
    def _block(self) -> int:
        return self.engine.config.block_size

    def _session(
        self,
        rows: Sequence[Sequence[int]],
        steps: int,
        sampling: Sampling,
        alternatives: int | None,
    ) -> tuple[Session, object]:
        longest = min(max(map(len, rows)) + steps, self._block)
        slots = min(-(-longest // SLOTS) * SLOTS, self._block)
        if self.captured:
            steps = -(-steps // 256) * 256
        key = (len(rows), slots, steps, sampling, alternatives)
        # Taken, not shared: two threads may write at once.
        idle, self._idle = self._idle, None
        if idle is not None and idle[0] == key:
            return idle[1], key
        with torch.inference_mode():
            session = Session(
                self.engine,
                batch=len(rows),
                slots=slots,
                steps=steps,
                sampling=sampling,
                alternatives=alternatives,
                captured=self.captured,
            )
        return session, key


def window_start(start: int, length: int, block: int) -> int:
    """Where in a sequence of `length` ids the window begins that began at `start`.

    Positions are learned for each place, so a window cannot move without being read anew. It stays
    until its `block` positions are used up, then leaves the older quarter behind.
    """
    return start if length - start <= block else length - (block - block // 4)


def _chosen(session: Session, first: int, last: int, alternatives: int | None) -> Chosen:
    ids, logprobs = session.taken(first, last)
    return Chosen(ids[:, :, 0].tolist(), logprobs, ids[:, :, 1:])
