"""Loss on held-out text: nats per token, and bits per byte, which compares across vocabularies."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptforge.data.stream import TokenStream
from gptforge.distributed import ALONE, Ranks
from gptforge.hardware import Precision, autocast
from gptforge.model import IGNORE

TOKENS_AT_ONCE = 8192
"""More would fill the memory with logits and be no faster."""
LAG = 2
"""Batches until all have heard that one gives up: nobody waits for the answer."""


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model scored, and on how much."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """The same information per byte of UTF-8 text."""
    tokens: int
    """Tokens that were predicted."""
    bytes: int
    """Bytes of text that they stand for."""

    @property
    def perplexity(self) -> float:
        """exp(loss): how many tokens the model hesitates between."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class PartialLoss:
    """An evaluation that was stopped on the way: what its first windows came to.

    It is saved with the checkpoint, so that a resumed run continues where this one stopped.
    """

    windows: int
    """Windows evaluated, counted from the first, by all ranks together."""
    num_windows: int
    """Windows in the whole evaluation: the sums fit no other."""
    nats: float
    """Summed cross-entropy of their tokens."""
    tokens: int
    bytes: int


class HeldOut:
    """A held-out text, cut into windows that do not overlap; the last one may be short.

    Args:
        tokens: ids of the text, at least 2.
        byte_lengths: bytes that each id stands for. The loss is over these ids alone, as in
            sampling: padding rows of the embedding get no probability.
        context_length: tokens in a window, T.
        batch_size: windows that go through the model at once.
        limit: read about so many tokens, in windows spread evenly; 0 reads all.
    """

    def __init__(
        self,
        tokens: TokenStream,
        byte_lengths: NDArray[np.int64],
        *,
        context_length: int,
        batch_size: int,
        limit: int = 0,
    ) -> None:
        assert len(tokens) > 1, "the held-out part's length is checked before"
        self._tokens = tokens
        self._byte_lengths = byte_lengths
        self._context_length = context_length
        windows = math.ceil((len(tokens) - 1) / context_length)
        wanted = math.ceil(limit / context_length) if limit else windows
        self._starts = np.linspace(0, windows, min(wanted, windows), endpoint=False, dtype=np.int64)
        at_once = max(1, TOKENS_AT_ONCE // context_length)
        self._batch_size = min(batch_size, at_once, len(self._starts))
        self.share = len(self._starts) / windows
        self.tokens = len(self._starts) * context_length
        """About as many are read."""
        self.batches = math.ceil(len(self._starts) / self._batch_size)
        """In so many batches, by one process."""

    def evaluate(self, model: nn.Module, precision: Precision, ranks: Ranks = ALONE) -> HeldOutLoss:
        """Score the model; its training mode is put back afterwards.

        Args:
            model: gives the summed loss of inputs and targets, called as `GPT.forward`.
            precision: of its products.
            ranks: who judge together, each a part of the windows; all get the same score.
        """
        score = self.evaluate_until(lambda: False, model, precision, ranks)
        assert isinstance(score, HeldOutLoss), "nothing stops it"
        return score

    @torch.no_grad()
    def evaluate_until(
        self,
        should_stop: Callable[[], bool],
        model: nn.Module,
        precision: Precision,
        ranks: Ranks = ALONE,
        partial: PartialLoss | None = None,
    ) -> HeldOutLoss | PartialLoss:
        """The same, unless `should_stop` is true on any rank after a batch that is not the last.

        Args:
            should_stop: asked after each batch.
            model: as in `evaluate`.
            precision: as in `evaluate`.
            ranks: as in `evaluate`; all of them stop after the same batch.
            partial: what an earlier call with the same weights came to; continued from there.

        Returns:
            The score, or the sums so far: at least one batch further than `partial`.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        first, nats, tokens, n_bytes = 0, 0.0, 0, 0
        if partial is not None and partial.num_windows == len(self._starts):
            first = partial.windows
            if ranks.is_first:
                nats, tokens, n_bytes = partial.nats, partial.tokens, partial.bytes
        total = torch.tensor(nats, dtype=torch.float64, device="cpu")
        each, stops = self._batch_size, ranks.agreement(LAG)
        stopped = False
        while first < len(self._starts) and not stopped:
            begin = first + ranks.rank * each
            inputs, targets = self._batch(self._starts[begin : begin + each])
            with autocast(device, precision):
                total += self._loss(model, inputs.to(device), targets.to(device))
            real = targets[targets != IGNORE].numpy()
            tokens += len(real)
            n_bytes += int(self._byte_lengths[real].sum())
            ranks.tick()
            first += each * ranks.size
            stopped = bool(stops.say(int(should_stop())))
        model.train(was_training)
        nats, *counts = ranks.totals([float(total), tokens, n_bytes])
        tokens, n_bytes = (round(count) for count in counts)
        if first < len(self._starts):
            return PartialLoss(first, len(self._starts), nats, tokens, n_bytes)
        return HeldOutLoss(nats / tokens, nats / math.log(2) / max(1, n_bytes), tokens, n_bytes)

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of a batch, as a float64 scalar on the CPU."""
        loss: Tensor = model(inputs, targets, len(self._byte_lengths))
        return loss.double().cpu()

    def _batch(self, windows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (len(windows), T) each; behind the text's end targets are IGNORE.

        No windows give one that counts for nothing: a rank with no part in a round still takes part
        in what all ranks do there.
        """
        length = self._context_length
        if len(windows) == 0:
            nothing = torch.zeros((1, length), dtype=torch.long)
            return nothing, torch.full_like(nothing, IGNORE)
        inputs = np.zeros((len(windows), length), np.int64)
        targets = np.full((len(windows), length), IGNORE, np.int64)
        for row, window in enumerate(windows.tolist()):
            part = self._tokens[window * length : (window + 1) * length + 1]
            inputs[row, : len(part)] = part[:length]
            targets[row, : len(part) - 1] = part[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)
