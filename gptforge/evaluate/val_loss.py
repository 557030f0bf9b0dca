"""Loss on held-out text: nats per token, and bits per byte, which compares across vocabularies."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptforge.data.token_dataset import TokenDataset
from gptforge.device import Precision, autocast
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.model import IGNORE_INDEX

MAX_BATCH_TOKENS = 8192
"""More would fill the memory with logits and be no faster."""
STOP_LAG_BATCHES = 2
"""Batches until all have heard that one gives up: nobody waits for the answer."""


@dataclass(frozen=True)
class ValLoss:
    """What a model scored, and on how much."""

    loss: float
    """Mean cross-entropy, nats per token."""
    bits_per_byte: float
    """The same information per byte of UTF-8 text."""
    num_tokens: int
    """Tokens that were predicted."""
    num_bytes: int
    """Bytes of text that they stand for."""

    @property
    def perplexity(self) -> float:
        """exp(loss): how many tokens the model hesitates between."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class PartialValLoss:
    """An evaluation that was stopped on the way: what its first windows came to.

    It is saved with the checkpoint, so that a resumed run continues where this one stopped.
    """

    sequences_done: int
    """Windows evaluated, counted from the first, by all ranks together."""
    num_sequences: int
    """Windows in the whole evaluation: the sums fit no other."""
    total_nats: float
    """Summed cross-entropy of their tokens."""
    num_tokens: int
    num_bytes: int


class ValEvaluator:
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
        tokens: TokenDataset,
        byte_lengths: NDArray[np.int64],
        *,
        context_length: int,
        batch_size: int,
        max_tokens: int = 0,
    ) -> None:
        assert len(tokens) > 1, "the held-out part's length is checked before"
        self._tokens = tokens
        self._byte_lengths = byte_lengths
        self._context_length = context_length
        windows = math.ceil((len(tokens) - 1) / context_length)
        wanted = math.ceil(max_tokens / context_length) if max_tokens else windows
        self._sequence_indices = np.linspace(
            0, windows, min(wanted, windows), endpoint=False, dtype=np.int64
        )
        at_once = max(1, MAX_BATCH_TOKENS // context_length)
        self._batch_size = min(batch_size, at_once, len(self._sequence_indices))
        self.fraction = len(self._sequence_indices) / windows
        self.num_tokens = len(self._sequence_indices) * context_length
        """About as many are read."""
        self.num_batches = math.ceil(len(self._sequence_indices) / self._batch_size)
        """In so many batches, by one process."""

    def evaluate(
        self, model: nn.Module, precision: Precision, ranks: Comm = SINGLE_PROCESS
    ) -> ValLoss:
        """Score the model; its training mode is put back afterwards.

        Args:
            model: gives the summed loss of inputs and targets, called as `GPT.forward`.
            precision: of its products.
            ranks: who judge together, each a part of the windows; all get the same score.
        """
        score = self.evaluate_until(lambda: False, model, precision, ranks)
        assert isinstance(score, ValLoss), "nothing stops it"
        return score

    @torch.no_grad()
    def evaluate_until(
        self,
        should_stop: Callable[[], bool],
        model: nn.Module,
        precision: Precision,
        ranks: Comm = SINGLE_PROCESS,
        partial: PartialValLoss | None = None,
    ) -> ValLoss | PartialValLoss:
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
        if partial is not None and partial.num_sequences == len(self._sequence_indices):
            first = partial.sequences_done
            if ranks.is_main:
                nats, tokens, n_bytes = partial.total_nats, partial.num_tokens, partial.num_bytes
        total = torch.tensor(nats, dtype=torch.float64, device="cpu")
        each, stops = self._batch_size, ranks.async_max(STOP_LAG_BATCHES)
        stopped = False
        while first < len(self._sequence_indices) and not stopped:
            begin = first + ranks.rank * each
            inputs, targets = self._batch(self._sequence_indices[begin : begin + each])
            with autocast(device, precision):
                total += self._loss(model, inputs.to(device), targets.to(device))
            real = targets[targets != IGNORE_INDEX].numpy()
            tokens += len(real)
            n_bytes += int(self._byte_lengths[real].sum())
            ranks.tick()
            first += each * ranks.world_size
            stopped = bool(stops.update(int(should_stop())))
        model.train(was_training)
        nats, *counts = ranks.sum_scalars([float(total), tokens, n_bytes])
        tokens, n_bytes = (round(count) for count in counts)
        if first < len(self._sequence_indices):
            return PartialValLoss(first, len(self._sequence_indices), nats, tokens, n_bytes)
        return ValLoss(nats / tokens, nats / math.log(2) / max(1, n_bytes), tokens, n_bytes)

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
            return nothing, torch.full_like(nothing, IGNORE_INDEX)
        inputs = np.zeros((len(windows), length), np.int64)
        targets = np.full((len(windows), length), IGNORE_INDEX, np.int64)
        for row, window in enumerate(windows.tolist()):
            part = self._tokens[window * length : (window + 1) * length + 1]
            inputs[row, : len(part)] = part[:length]
            targets[row, : len(part) - 1] = part[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)
