"""One update: a global batch in micro-batches, gradients clipped, weights moved."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gptforge.hardware import PLAIN, Kernels, Precision, synchronize
from gptforge.model import GPT
from gptforge.train.by_autograd import ByAutograd
from gptforge.train.by_hand import ByHand
from gptforge.train.replay import Replay
from gptforge.train.savings import NO_SAVINGS, Savings


class TrainStep:
    """Model, optimizer and precision, put together for one purpose.

    Args:
        model: the plain module, whose weights are trained.
        optimizer: over the model's parameters; its learning rate is set at each update.
        precision: type of the matrix products.
        micro_batch: windows that go through the model at once.
        grad_clip: longest gradient norm let through; 0 lets all through.
        kernels: how an update is computed where there is a choice.
        savings: what is made twice, or in pieces, to take less memory.
        may_shrink: whether to halve the micro-batch and try again when memory runs out.
        say: told when that happens.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        micro_batch: int,
        grad_clip: float,
        kernels: Kernels = PLAIN,
        savings: Savings = NO_SAVINGS,
        may_shrink: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = precision
        self.micro_batch = micro_batch
        self._savings = savings
        self._grad_clip = grad_clip if grad_clip > 0 else float("inf")
        self._may_shrink = may_shrink
        self._say = say
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)
        self.use(kernels)

    def use(self, kernels: Kernels) -> None:
        """Compute updates with these kernels from now on, uncompiled."""
        self.kernels = kernels
        self.is_compiled = False
        self.optimizer.zero_grad(set_to_none=True)
        self._way: ByAutograd | ByHand | Replay
        if kernels.by_hand:
            self._way = ByHand(
                self.model, self.precision.dtype, savings=self._savings, flash4=kernels.flash4
            )
        else:
            self._way = ByAutograd(
                self.model, self.precision, kernels, scaler=self._scaler, savings=self._savings
            )

    @property
    def way(self) -> str:
        """How an update is made, in words."""
        if isinstance(self._way, ByAutograd):
            return "autograd"
        return "written out, recorded" if isinstance(self._way, Replay) else "written out"

    def record(self) -> None:
        """Play a micro-batch back from a recording from now on, if it is written out."""
        if isinstance(self._way, ByHand):
            self._way = Replay(self._way)

    def compile(self) -> None:
        """Run the model compiled from now on."""
        assert isinstance(self._way, ByAutograd), "there is nothing to compile"
        self._way.compile()
        self.is_compiled = True

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from one global batch, both (G, T).

        An update whose gradient is not finite is left out: weights and moments stay as they are.

        Returns:
            Mean loss over the batch's tokens, and gradient norm before clipping: scalars that stay
            on the device, so that nothing waits for them.
        """
        self.model.train()
        while (loss := self._gradients(inputs, targets)) is None:
            self._shrink()
        self._scaler.unscale_(self.optimizer)
        norm = self._way.clip(self._grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if not self._scaler.is_enabled():
            # torch's fused optimizers look for this flag, on the device, before they move a
            # weight; the scaler sets it by itself.
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Gradients of a global batch in its parameters, and its loss; None if memory ran out."""
        loss = torch.zeros((), device=self.device)
        share = 1 / targets.numel()
        parts = zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True)
        try:
            self._way.begin()
            # Each micro-batch counts by its tokens, so the split never changes the sum.
            for x, y in parts:
                loss += self._learn(x, y, share) * share
        except torch.OutOfMemoryError:
            if not self._may_shrink or self.micro_batch == 1:
                raise
            return None
        return loss

    def _learn(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Add `scale` times the gradients of a micro-batch's summed loss, which is returned."""
        return self._way(x, y, scale)

    def _shrink(self) -> None:
        """Halve the micro-batch, after memory ran out; what was done of the batch is forgotten."""
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self._way, Replay):
            self._way.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = -(-self.micro_batch // 2)
        self._say(f"note: memory ran out; going on with micro-batches of {self.micro_batch}")

    def rehearse(self, windows: int, context_length: int) -> float:
        """Seconds for a forward and backward over some tokens, which leave no trace."""
        count = windows * context_length
        # Not all alike: adding up many gradients of one token takes far longer than of many.
        tokens = torch.arange(count, device=self.device) % self.model.config.vocab_size
        x = tokens.view(windows, context_length)
        self.model.train()
        with _kept_dice(self.device):
            synchronize(self.device)
            start = time.perf_counter()
            self._way.begin()
            self._learn(x, x, 1 / count)
            synchronize(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def fits(self, windows: int, context_length: int) -> bool:
        """Whether so many windows go through the device's memory at once; tried out.

        Room is kept for AdamW's moments and for the copy that a save takes: 20 bytes a parameter.
        """
        kept = None
        try:
            if self.device.type == "cuda" and not self.optimizer.state:
                count = 20 * sum(p.numel() for p in self.model.parameters())
                kept = torch.empty(count, dtype=torch.uint8, device=self.device)
            self.rehearse(windows, context_length)
        except torch.OutOfMemoryError:
            fit = False
        else:
            fit = True
        del kept
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fit

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


@contextmanager
def _kept_dice(device: torch.device) -> Iterator[None]:
    """Put the random number generators back as they were: dropout must not notice a rehearsal."""
    devices = [device] if device.type == "cuda" else []
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)
