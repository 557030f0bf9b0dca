"""What a first step on a GPU would wait for, begun beside all else: seconds."""

import contextlib
import threading
from collections.abc import Callable

import torch

from gptforge.builders.memory_fit import kernels_for
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.estimate.formulas import gelu_save_interval
from gptforge.kernels.attention import (
    PackedAttention,
    TritonAttention,
    attention_backward,
    attention_forward,
    causal_attention,
    select_attention,
)
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.dropout import DropoutSeed, dropout_threshold
from gptforge.kernels.embedding import embedding, embedding_backward
from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.layer_norm import add_layer_norm, layer_norm_backward
from gptforge.kernels.reductions import accumulate_column_sums
from gptforge.model import IGNORE_INDEX
from gptforge.train.backends.manual_layers import prefer_separate_dgelu

WARMUP_TOKENS = 64
"""Tokens of a trial: Triton's kernels are the same for any number of them."""


class KernelWarmup:
    """A GPU makes itself ready, with Triton and cuDNN, while texts are read and weights are drawn.

    Args:
        device: nothing happens on a CPU.
        config: says what attention and the layers will look like.
        precision: of the products.
    """

    def __init__(self, device: torch.device, config: Config, precision: Precision) -> None:
        self._device, self._config, self._precision = device, config, precision
        self._threads: list[threading.Thread] = []
        self._is_by_hand = kernels_for(config, device, precision).manual_backward
        if device.type != "cuda":
            return
        # Triton in one of them only: its compiler was not made for several at once.
        for work in [self.run_attention, *([self.run_triton_kernels] if self._is_by_hand else [])]:
            # No daemon: a process that ended under it would take the driver down as it starts.
            thread = threading.Thread(target=self._run, args=(work,), name="warming up")
            self._threads.append(thread)
            thread.start()

    def wait(self) -> None:
        """Until all is ready."""
        for thread in self._threads:
            thread.join()

    def run_attention(self) -> None:
        """Products and attention, as torch does it: cuDNN's plans are for one shape."""
        square = torch.zeros(64, 64, device=self._device)
        square.mm(square)
        c = self._config
        # As training has them: q, k and v side by side.
        qkv = self._zeros(c.batch_size, c.context_length, 3, c.n_head, c.n_embd // c.n_head)
        if self._is_by_hand and isinstance(self._way, TritonAttention):
            if self._drop is None:
                self._way.forward(qkv, None)
            return
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
        # Without dropout, which would throw dice.
        out = causal_attention(q, k, v, 0.0)
        torch.autograd.grad(out, (q, k, v), out.detach())

    def run_triton_kernels(self) -> None:
        """Every kernel of Triton's that an update takes, in shapes that are compiled the same."""
        c, device = self._config, self._device
        width, inner = c.n_embd, c.mlp_ratio * c.n_embd
        vector, to_qkv = torch.ones(width, device=device), torch.zeros(3 * width, device=device)
        rows, drop = self._zeros(WARMUP_TOKENS, width), self._drop
        if isinstance(self._way, TritonAttention):
            qkv = self._zeros(1, c.context_length, 3, c.n_head, width // c.n_head)
            flat = self._zeros(c.context_length, width)
            lse = torch.zeros(1, c.n_head, c.context_length, device=device)
            if drop is not None:
                attention_forward(qkv, drop)
            attention_backward(qkv, flat, lse, flat, drop)
        else:
            accumulate_column_sums(self._zeros(WARMUP_TOKENS, 3 * width), to_qkv)
        ids = torch.zeros(1, WARMUP_TOKENS, dtype=torch.long, device=device)
        embedding(
            ids, vector[None], torch.zeros(WARMUP_TOKENS, width, device=device), rows.dtype, drop
        )
        embedding_backward(rows, ids[0], torch.zeros(1, width, device=device))
        for branch in (None, rows.clone()):
            _, norm = add_layer_norm(rows, branch, vector, vector, drop)
            layer_norm_backward(rows.clone(), norm, vector, branch, to_qkv)
        wide, sums = self._zeros(WARMUP_TOKENS, inner), torch.zeros(inner, device=device)
        if gelu_save_interval(width) > 1:
            gelu_backward(wide, wide.clone(), sums, recompute=True)
        if prefer_separate_dgelu(device, width):
            gelu_backward(wide, wide.clone(), sums, recompute=False)
        else:
            accumulate_column_sums(wide, sums)
        if c.vocab_size:
            # Otherwise it follows from the text.
            cross_entropy_in_place(self._zeros(WARMUP_TOKENS, c.vocab_size), ids[0], IGNORE_INDEX)

    def _run(self, work: Callable[[], None]) -> None:
        # Whatever fails here fails again where it is wanted, and is told there. The current device,
        # on which Triton starts its kernels, is each thread's own.
        with contextlib.suppress(Exception), torch.cuda.device(self._device):
            work()

    @property
    def _drop(self) -> DropoutSeed | None:
        """Something to drop with. Dice are for the model: any keys will do."""
        dropped = dropout_threshold(self._config.dropout)
        keys = torch.zeros(2, dtype=torch.int32, device=self._device)
        return DropoutSeed(keys, dropped) if dropped else None

    @property
    def _way(self) -> PackedAttention:
        c = self._config
        size = c.n_embd // c.n_head
        return select_attention(
            self._device, self._precision.dtype, head_size=size, dropout=c.dropout
        )

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self._device, dtype=self._precision.dtype)
