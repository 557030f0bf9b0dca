"""Compile Triton kernels and build cuDNN plans in threads, while texts are read: saves seconds."""

import contextlib
import itertools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from gptforge.config import Config
from gptforge.device import Precision
from gptforge.estimate.formulas import gelu_save_interval
from gptforge.kernel_select import select_kernels
from gptforge.kernels.attention import (
    PackedAttention,
    TritonAttention,
    attention_backward,
    attention_forward,
    causal_attention,
    select_attention,
)
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.dropout import DropoutSeed
from gptforge.kernels.embedding import embedding, embedding_backward
from gptforge.kernels.float8 import (
    E4M3,
    E5M2,
    cast_transpose,
    empty_float8,
    gelu_backward_cast_transpose,
    transpose,
    unit_scale,
)
from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.layer_norm import add_layer_norm, layer_norm_backward
from gptforge.kernels.reductions import accumulate_column_sums
from gptforge.training.backends.manual_layers import prefer_separate_dgelu

WARMUP_TOKENS = 64
"""Rows of the warmup's tensors: Triton compiles the same kernels for any number of them."""


class KernelWarmup:
    """Warms up the kernels that the first step on a GPU would wait for; does nothing on a CPU."""

    def __init__(self, device: torch.device, config: Config, precision: Precision) -> None:
        self._device, self._config, self._dtype = device, config, precision.dtype
        self._threads: list[threading.Thread] = []
        self._is_manual = select_kernels(config, device, precision).manual_backward
        self._float8 = precision.float8
        self._head_size = config.n_embd // config.n_head
        if device.type != "cuda":
            return
        # Triton's compiler is not thread-safe: one thread has all of its kernels.
        works = [self.run_attention] + [self.run_triton_kernels] * self._is_manual
        for work in works:
            # Not a daemon: exiting while the driver initializes can crash the process.
            thread = threading.Thread(target=self._run, args=(work,), name="kernel-warmup")
            self._threads.append(thread)
            thread.start()

    def wait(self) -> None:
        """Wait until all kernels are ready."""
        for thread in self._threads:
            thread.join()

    def run_attention(self) -> None:
        """Run a matmul, and attention in its full shape: cuDNN's plans are for one shape."""
        square = torch.zeros(64, 64, device=self._device)
        square.mm(square)
        c = self._config
        qkv = self._zeros(c.batch_size, c.context_length, 3, c.n_head, self._head_size)
        if self._is_manual and isinstance(self._attention, TritonAttention):
            if self._dropout_seed() is None:
                self._attention.forward(qkv, None)
            return
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
        # Without dropout, which would advance the RNG.
        out = causal_attention(q, k, v, 0.0)
        torch.autograd.grad(out, (q, k, v), out.detach())

    def run_triton_kernels(self) -> None:
        """Run every Triton kernel of a training step, in shapes that compile to the same code."""
        c, device, n_embd = self._config, self._device, self._config.n_embd
        d_ff = c.mlp_ratio * n_embd
        vector, qkv_bias = torch.ones(n_embd, device=device), torch.zeros(3 * n_embd, device=device)
        rows, dropout = self._zeros(WARMUP_TOKENS, n_embd), self._dropout_seed()
        if isinstance(self._attention, TritonAttention):
            qkv = self._zeros(1, c.context_length, 3, c.n_head, self._head_size)
            out = self._zeros(c.context_length, n_embd)
            lse = torch.zeros(1, c.n_head, c.context_length, device=device)
            if dropout is not None:
                attention_forward(qkv, dropout)
            attention_backward(qkv, out, lse, out, dropout)
        else:
            accumulate_column_sums(self._zeros(WARMUP_TOKENS, 3 * n_embd), qkv_bias)
        ids = torch.zeros(1, WARMUP_TOKENS, dtype=torch.long, device=device)
        positions = torch.zeros(WARMUP_TOKENS, n_embd, device=device)
        embedding(ids, vector[None], positions, rows.dtype, dropout)
        embedding_backward(rows, ids[0], torch.zeros(1, n_embd, device=device))
        # A run in fp8 has its warmup steps in bfloat16.
        ln_out_dtypes = (None, E4M3) if self._float8 else (None,)
        for sublayer_output, dtype in itertools.product((None, rows.clone()), ln_out_dtypes):
            _, saved = add_layer_norm(rows, sublayer_output, vector, vector, dropout, dtype)
            layer_norm_backward(rows.clone(), saved, vector, sublayer_output, qkv_bias)
        hidden, bias_grad = self._zeros(WARMUP_TOKENS, d_ff), torch.zeros(d_ff, device=device)
        if self._float8:
            self._run_float8_kernels(rows, hidden, bias_grad, ids[0])
        if gelu_save_interval(n_embd) > 1:
            gelu_backward(hidden, hidden.clone(), bias_grad, recompute=True)
        if prefer_separate_dgelu(device, n_embd):
            gelu_backward(hidden, hidden.clone(), bias_grad, recompute=False)
        else:
            accumulate_column_sums(hidden, bias_grad)
        if c.vocab_size:
            # 0 until the text is tokenized.
            cross_entropy_in_place(self._zeros(WARMUP_TOKENS, c.vocab_size), ids[0])

    def _run_float8_kernels(
        self, rows: Tensor, hidden: Tensor, bias_grad: Tensor, targets: Tensor
    ) -> None:
        scale = unit_scale(self._device)
        for source, dtype in ((rows, E4M3), (rows, E5M2), (rows.float(), E4M3)):
            transpose(cast_transpose(source, empty_float8(source, dtype, scale)).data)
        cast_transpose(hidden, empty_float8(hidden, E4M3, scale), gelu=True)
        gelu_backward_cast_transpose(hidden, hidden, empty_float8(hidden, E5M2, scale), bias_grad)
        if self._config.vocab_size:
            logits = self._zeros(WARMUP_TOKENS, self._config.vocab_size)
            out = torch.empty_like(logits, dtype=E5M2)
            cross_entropy_in_place(logits, targets, out=out)

    def _run(self, work: Callable[[], None]) -> None:
        # Errors are ignored: training runs into the same ones, and reports them. The current
        # device, on which Triton launches, is set per thread.
        with contextlib.suppress(Exception), torch.cuda.device(self._device):
            work()

    @property
    def _attention(self) -> PackedAttention:
        return select_attention(self._device, self._dtype, head_size=self._head_size)

    def _dropout_seed(self) -> DropoutSeed | None:
        """Any seed will do; drawing one would advance the RNG of training."""
        seed, p = torch.zeros(4, dtype=torch.int32, device=self._device), self._config.dropout
        return DropoutSeed(seed, p) if p else None

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self._device, dtype=self._dtype)
