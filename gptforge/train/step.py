"""One update: a global batch in micro-batches, gradients clipped, weights moved."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gptforge.hardware import Precision, autocast, synchronize
from gptforge.model import GPT

Loss = Callable[[Tensor, Tensor], Tensor]


class TrainStep:
    """Model, optimizer and precision, put together for one purpose.

    Args:
        model: the plain module, whose weights are trained.
        optimizer: over the model's parameters; its learning rate is set at each update.
        precision: type of the matrix products.
        micro_batch: windows that go through the model at once.
        grad_clip: longest gradient norm let through; 0 lets all through.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        micro_batch: int,
        grad_clip: float,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = precision
        self._forward: Loss = model
        self._micro_batch = micro_batch
        self._grad_clip = grad_clip if grad_clip > 0 else float("inf")
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from one global batch, both (G, T).

        Returns:
            Mean loss over the batch's tokens, and gradient norm before clipping: scalars that stay
            on the device, so that nothing waits for them.
        """
        self.model.train()
        loss = torch.zeros((), device=self.device)
        # Each micro-batch counts by its tokens, so the split never changes the sum.
        for x, y in zip(
            inputs.split(self._micro_batch), targets.split(self._micro_batch), strict=True
        ):
            part = self._loss(x, y) / targets.numel()
            self._scaler.scale(part).backward()
            loss += part.detach()
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def compile(self) -> None:
        """Run the model compiled from now on. The saved weights' names stay those of the module."""
        self._forward = torch.compile(self.model)

    def rehearse(self, windows: int, context_length: int) -> float:
        """Seconds for a forward and backward over zeros, which leave no trace."""
        x = torch.zeros((windows, context_length), dtype=torch.int64, device=self.device)
        self.model.train()
        with _kept_dice(self.device):
            synchronize(self.device)
            start = time.perf_counter()
            self._loss(x, x).backward()
            synchronize(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def drop_compiled(self) -> None:
        """Go back to the plain model."""
        self._forward = self.model
        self.optimizer.zero_grad(set_to_none=True)

    def scaler_state(self) -> dict[str, float]:
        """The loss scaler's state; empty where there is none."""
        return {name: float(value) for name, value in self._scaler.state_dict().items()}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Go on with a saved scale."""
        if state and self._scaler.is_enabled():
            whole = {"growth_interval", "_growth_tracker"}
            self._scaler.load_state_dict(
                {name: int(value) if name in whole else value for name, value in state.items()}
            )

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self._forward(x, y)


@contextmanager
def _kept_dice(device: torch.device) -> Iterator[None]:
    """Put the random number generators back as they were: dropout must not notice a rehearsal."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
