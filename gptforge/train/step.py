"""One update: a global batch in micro-batches, gradients clipped, weights moved."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptforge.distributed import ALONE, Ranks
from gptforge.hardware import PLAIN, Kernels, Precision, synchronize
from gptforge.model import GPT
from gptforge.optim.adamw import AdamW
from gptforge.optim.optimizer import Optimizer
from gptforge.train.by_autograd import ByAutograd
from gptforge.train.by_hand import ByHand
from gptforge.train.descent import Descent
from gptforge.train.gathered import GatheredWeights, ShardedGradients, SumsToShards
from gptforge.train.parallel import (
    AutogradGradients,
    GradientSync,
    LooseGradients,
    OverRanks,
)
from gptforge.train.replay import Replay, ReplayedDescent
from gptforge.train.savings import NO_SAVINGS, Savings
from gptforge.train.sharded import InShards, Root, put_together


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
        ranks: who learns from a global batch together, each from its part.
        root: what the model is called through, if it lies in shards.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        *,
        precision: Precision,
        micro_batch: int,
        grad_clip: float,
        kernels: Kernels = PLAIN,
        savings: Savings = NO_SAVINGS,
        may_shrink: bool = False,
        say: Callable[[str], None] = print,
        ranks: Ranks = ALONE,
        root: Root | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = precision
        self.micro_batch = micro_batch
        self._savings = savings
        assert root is None or not may_shrink, "the others would wait for a rank that tries again"
        self._may_shrink = may_shrink
        self._say = say
        self._ranks, self._root = ranks, root
        self._is_short = False
        """Whether memory ran out too late to begin the batch anew."""
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)
        self._descend = Descent(optimizer, grad_clip=grad_clip, scaler=self._scaler)
        self.use(kernels)

    def use(self, kernels: Kernels) -> None:
        """Compute updates with these kernels from now on, uncompiled."""
        self.kernels = kernels
        self.is_compiled = False
        # Its gradients and weights first: there may be no room for those of two.
        self.__dict__.pop("_way", None)
        self._ending: ReplayedDescent | None = None
        self.optimizer.zero_grad(set_to_none=True)
        self._way: ByAutograd | ByHand | Replay
        self._sync = GradientSync()
        if kernels.by_hand:
            self._way = self._written_out(kernels)
            return
        gradients = LooseGradients()
        if self._root is not None:
            self._sync = InShards(self._ranks)
        elif self._ranks.size > 1:
            gradients = self._gradients_in_a_row
            self._sync = OverRanks(self._ranks, self._gradients_in_a_row)
            self._gradients_in_a_row.made = self._sync.made
        self._way = ByAutograd(
            self.model,
            self.precision,
            kernels,
            scaler=self._scaler,
            savings=self._savings,
            gradients=gradients,
            root=self._root,
            size=self._ranks.size,
            by_block=self._ranks.size > 1,
        )

    def _written_out(self, kernels: Kernels) -> ByHand:
        dtype, ranks = self.precision.dtype, self._ranks
        make = functools.partial(ByHand, self.model, dtype, savings=self._savings, kernels=kernels)
        if self._root is not None:
            way = make(
                weights=GatheredWeights(dtype, self._root, ranks),
                gradients=functools.partial(ShardedGradients, ranks=ranks),
            )
            assert isinstance(way.gradients, ShardedGradients)
            self._sync = SumsToShards(ranks, way.gradients)
        else:
            way = make()
            if ranks.size > 1:
                self._sync = OverRanks(ranks, way.gradients)
        way.made = self._sync.made
        return way

    @functools.cached_property
    def _gradients_in_a_row(self) -> AutogradGradients:
        """Made once: what it hangs on the parameters stays there."""
        return AutogradGradients(self.model)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a piece of the model only."""
        return self._root is not None

    @property
    def judged(self) -> nn.Module:
        """What gives the summed loss of inputs and targets in an evaluation."""
        return self.model if self._root is None else self._root

    def whole_model(self) -> GPT | None:
        """The model as one process can use it, on rank 0 only; all have to ask."""
        if self._root is not None:
            return put_together(self.model, self.precision.dtype, self.device, self._ranks)
        return self.model if self._ranks.is_first else None

    @property
    def way(self) -> str:
        """How an update is made, in words."""
        ways = {ByAutograd: "autograd", ByHand: "written out", Replay: "written out, recorded"}
        return ways[type(self._way)] + (", in shards" if self.is_sharded else "")

    def record(self, context_length: int) -> bool:
        """Play updates back from recordings from now on; whether there is memory for them.

        All are made here, and leave no trace but room for the optimizer's state. A recording has
        memory of its own, beside what an update takes that is not played back.
        """
        assert isinstance(self._way, ByHand), "only what is written out can be recorded"
        assert self._root is None, "others would have to be waited for in a recording"
        # What is played back calls nobody: its gradients are sent when all are there.
        self._way.made = GradientSync().made
        self._way = Replay(self._way)
        if type(self.optimizer) is AdamW and not self.precision.needs_scaler:
            self._ending = self._way.ending(self._descend)
        # The first one warms up, the second one is recorded.
        if not all(self.fits(self.micro_batch, context_length) for _ in range(2)):
            return False
        if self._ending is not None:
            try:
                for _ in range(2):
                    # Left out, as any update is whose loss is no number: nothing moves.
                    self._ending(torch.full((), math.nan, device=self.device), 0.0)
            except torch.OutOfMemoryError:
                return False
            self.optimizer.zero_grad(set_to_none=True)
        return True

    def compile(self) -> None:
        """Run the model compiled from now on."""
        assert isinstance(self._way, ByAutograd), "there is nothing to compile"
        self._way.compile()
        self.is_compiled = True

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from one global batch, or this rank's part of it, both (G, T).

        An update whose gradient or loss is not finite is left out: weights and moments stay as they
        are.

        Returns:
            Mean loss over the tokens of all ranks, and gradient norm before clipping: scalars that
            stay on the device, so that nothing waits for them, and are the same on every rank.
        """
        if not self.judged.training:
            # It asks every module by itself: as long as a hundred kernels take to launch.
            self.judged.train()
        while (loss := self._gradients(inputs, targets)) is None:
            self._shrink()
        if self._is_short:
            self._shrink()
        if self._ending is not None:
            return loss, self._ending(loss, lr)
        norm = self._descend(self._way.clip, loss, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Gradients of a global batch in its parameters, and its loss; None if memory ran out."""
        loss = torch.zeros((), device=self.device)
        share = 1 / (targets.numel() * self._ranks.size)
        parts = list(
            zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True)
        )
        try:
            # Once it is there it stays. What it takes, a trial of micro-batches did not see.
            self.optimizer.prepare()
            self._sync.begin()
            self._way.begin()
            # Each micro-batch counts by its tokens, so the split never changes the sum.
            for left, (x, y) in zip(reversed(range(len(parts))), parts, strict=True):
                if not left:
                    self._sync.arm()
                loss += self._learn(x, y, share) * share
                self._ranks.tick()
        except torch.OutOfMemoryError:
            if not self._may_shrink or self.micro_batch == 1:
                raise
            if not self._sync.has_begun():
                # Other ranks wait a little longer, and never hear of it.
                self.optimizer.zero_grad(set_to_none=True)
                return None
            self._sync.give_up()
            loss.fill_(math.nan)
            self._is_short = True
        return self._sync.finish(loss)

    def _learn(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Add `scale` times the gradients of a micro-batch's summed loss, which is returned."""
        return self._way(x, y, scale)

    def _shrink(self) -> None:
        """Halve the micro-batch, after memory ran out."""
        self._is_short = False
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
        self.judged.train()
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
        return self._descend.scaler_state()

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Go on with a saved scale."""
        self._descend.load_scaler_state(state)


@contextmanager
def _kept_dice(device: torch.device) -> Iterator[None]:
    """Put the random number generators back as they were: dropout must not notice a rehearsal."""
    devices = [device] if device.type == "cuda" else []
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)
