"""Validation loss: nats per token; bits per byte and nats per character compare vocabularies.

There is one definition, for training and `gptforge eval`: the held-out ids are cut into sequences
of context_length that do not overlap, the last of which may be short, and each id but the first is
predicted from those before it in its sequence. docs/training.md describes it for users.
"""

import copy
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptforge.data.token_dataset import TokenDataset
from gptforge.device import Precision, autocast
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.report.format import ValLoss

MAX_BATCH_TOKENS = 8192  # more would fill the memory with logits and be no faster
STOP_LAG_BATCHES = 2  # the flag to stop is reduced asynchronously, and read so much later


class ValEvaluator:
    """Evaluates models on sequences of held-out text that do not overlap; the last may be short.

    Args:
        tokens: ids of the text, at least 2.
        byte_lengths: bytes that each id stands for, (vocab,). The loss is over these ids alone, as
            in sampling: padding rows of the embedding get no probability.
        context_length: T, tokens in a sequence.
        batch_size: sequences in a forward pass.
        char_lengths: characters that each id stands for, (vocab,); None: one per byte.
        max_tokens: evaluate this many tokens, rounded up to full sequences, which are spread
            evenly; 0 is all.

    Attributes:
        fraction: share of the text that is evaluated.
        num_tokens: tokens that are predicted.
        seconds_per_sequence: of the fastest evaluation so far, since the first may compile and any
            may share the machine; infinite before the first.
    """

    seconds_per_sequence = math.inf

    def __init__(
        self,
        tokens: TokenDataset,
        byte_lengths: NDArray[np.int64],
        *,
        context_length: int,
        batch_size: int,
        char_lengths: NDArray[np.int64] | None = None,
        max_tokens: int = 0,
    ) -> None:
        assert len(tokens) > 1, "the caller checks the length of the held-out text"
        self._tokens = tokens
        self._byte_lengths = byte_lengths
        self._char_lengths = byte_lengths if char_lengths is None else char_lengths
        self._context_length = context_length
        self._batch_size = min(batch_size, max(1, MAX_BATCH_TOKENS // context_length))
        self._select(max_tokens)

    def _select(self, max_tokens: int) -> None:
        length, num_targets = self._context_length, len(self._tokens) - 1
        available = math.ceil(num_targets / length)
        self.num_tokens = num_predicted(len(self._tokens), length, max_tokens)
        count = math.ceil(self.num_tokens / length)
        # The last sequence, which may be short, is only among them if all are.
        self._sequence_indices = np.linspace(0, available, count, endpoint=False, dtype=np.int64)
        self.num_sequences = count  # on all ranks together
        self.fraction = count / available  # of the text

    def full(self) -> "ValEvaluator":
        """The evaluator of all the text."""
        full = copy.copy(self)
        full._select(0)
        return full

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        precision: Precision,
        comm: Comm = SINGLE_PROCESS,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        partial: ValLoss | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> ValLoss:
        """Evaluate a model, then restore its training mode.

        Args:
            model: called like `GPT.forward`; returns the summed loss of inputs and targets.
            precision: of the forward pass.
            comm: the ranks, which evaluate different sequences; all return the same loss.
            should_stop: called after each batch. If it is true on any rank, all ranks stop after
                the same batch, and the loss is not complete, unless that was the last one.
            partial: such a loss of an earlier call with the same weights, which is continued.
            progress: called after each batch with the sequences done, and all.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        done, num_sequences = 0, self.num_sequences
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        counts = np.zeros(3, np.int64)  # tokens, bytes and characters
        # The sums of an evaluation with another number of sequences do not fit this one.
        if partial is not None and partial.num_sequences == num_sequences:
            done = partial.sequences_done
            if comm.is_main:
                total += partial.total_nats
                counts += (partial.num_tokens, partial.num_bytes, partial.num_chars)
        stop_flag, stopped = comm.async_max(STOP_LAG_BATCHES), False
        start, first = time.perf_counter(), done
        while done < num_sequences and not stopped:
            begin = done + comm.rank * self._batch_size
            inputs, targets = self._batch(self._sequence_indices[begin : begin + self._batch_size])
            with autocast(device, precision):
                loss: Tensor = model(inputs.to(device), targets.to(device), len(self._byte_lengths))
                total += loss.double().cpu()
            predicted = targets[targets != IGNORE_INDEX].numpy()
            num_bytes = self._byte_lengths[predicted].sum()
            counts += (len(predicted), num_bytes, self._char_lengths[predicted].sum())
            comm.tick()
            done = min(done + self._batch_size * comm.world_size, num_sequences)
            progress(done, num_sequences)
            stopped = bool(stop_flag.update(int(should_stop())))
        model.train(was_training)
        if done > first:
            seconds = (time.perf_counter() - start) / (done - first)
            self.seconds_per_sequence = min(self.seconds_per_sequence, seconds)
        nats, *sums = comm.sum_scalars([float(total), *counts.tolist()])
        num_tokens, num_bytes, num_chars = map(round, sums)
        return ValLoss(nats, num_tokens, num_bytes, num_chars, done, num_sequences)

    def _batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (len(indices), T), with IGNORE_INDEX after the end.

        Without indices it is one sequence that counts for nothing: a rank with nothing left still
        takes part in the collectives.
        """
        length = self._context_length
        inputs = np.zeros((max(1, len(indices)), length), np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        for row, index in enumerate(indices.tolist()):
            ids = self._tokens[index * length : (index + 1) * length + 1]
            inputs[row, : len(ids)] = ids[:length]
            targets[row, : len(ids) - 1] = ids[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


def num_predicted(num_tokens: int, context_length: int, max_tokens: int) -> int:
    """Tokens of a held-out text of `num_tokens` that an evaluation of `max_tokens` predicts."""
    num_targets = num_tokens - 1
    full = math.ceil(max_tokens / context_length) * context_length
    return min(full or num_targets, num_targets)
