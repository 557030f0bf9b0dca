"""What a first step on a GPU would wait for, begun beside all else: seconds."""

import contextlib
import threading

import torch

from gptforge.config import Config
from gptforge.hardware import Precision
from gptforge.kernels.block import add_norm
from gptforge.kernels.packed_attention import fastest


class WarmUp:
    """A GPU makes itself ready, with Triton and cuDNN, while texts are read and weights are drawn.

    Args:
        device: nothing happens on a CPU.
        config: says what attention will look like.
        precision: of the products.
    """

    def __init__(self, device: torch.device, config: Config, precision: Precision) -> None:
        self._device, self._config, self._precision = device, config, precision
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            # No daemon: a process that ended under it would take the driver down as it starts.
            self._thread = threading.Thread(target=self._run, name="warming up")
            self._thread.start()

    def wait(self) -> None:
        """Until all is ready: nobody else may ask CUDA for memory while a graph is recorded."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        # Whatever fails here fails again where it is wanted, and is told there. The current device,
        # on which Triton starts its kernels, is each thread's own.
        with contextlib.suppress(Exception), torch.cuda.device(self._device):
            square = torch.zeros(64, 64, device=self._device)
            square.mm(square)
            self._norm()
            self._attend()

    def _norm(self) -> None:
        """A first kernel of Triton's, which hashes all of Triton to know its cached ones."""
        width = self._config.n_embd
        stream = torch.zeros(1, width, device=self._device, dtype=self._precision.dtype)
        weight = torch.ones(width, device=self._device)
        add_norm(stream, None, weight, weight)

    def _attend(self) -> None:
        """Both ways through attention: cuDNN's plans are for one shape, and so is this."""
        c = self._config
        shape = (c.batch_size, c.context_length, 3, c.n_head, c.n_embd // c.n_head)
        qkv = torch.zeros(shape, device=self._device, dtype=self._precision.dtype)
        way = fastest(self._device, qkv.dtype, head_size=shape[-1], dropout=self._config.dropout)
        rows, kept = way.forward(qkv)
        way.backward(rows, kept, torch.zeros(3 * c.n_embd, device=self._device))
