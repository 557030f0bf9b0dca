"""One update: a global batch in micro-batches, gradients clipped, weights moved."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gptforge.device import Precision, synchronize
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.model import GPT
from gptforge.optim.adamw import AdamW
from gptforge.optim.optimizer import Optimizer
from gptforge.train.backends.autograd import AutogradBackend
from gptforge.train.backends.cuda_graph import CudaGraphBackend, CudaGraphOptimizerStep
from gptforge.train.backends.manual import ManualBackend
from gptforge.train.optimizer_step import OptimizerStep
from gptforge.train.parallel.fsdp import FSDPReducer, FSDPRoot, gather_model
from gptforge.train.parallel.grad_reducer import (
    AutogradGradBuffer,
    BucketedAllReduce,
    GradReducer,
    LooseGrads,
)
from gptforge.train.parallel.zero1 import (
    AllGatheredWeights,
    BucketedReduceScatter,
    ShardedGradBuffer,
)
from gptforge.train.savings import DEFAULT_SAVINGS, Savings


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
        micro_batch_size: int,
        grad_clip: float,
        kernels: KernelConfig = DEFAULT_KERNELS,
        savings: Savings = DEFAULT_SAVINGS,
        halve_on_oom: bool = False,
        log: Callable[[str], None] = print,
        comm: Comm = SINGLE_PROCESS,
        root: FSDPRoot | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = next(model.parameters()).device
        self.precision = precision
        self.micro_batch_size = micro_batch_size
        self._savings = savings
        assert root is None or not halve_on_oom, "the others would wait for a rank that tries again"
        self._halve_on_oom = halve_on_oom
        self._log = log
        self._ranks, self._root = comm, root
        self._is_short = False
        """Whether memory ran out too late to begin the batch anew."""
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)
        self._optimizer_step = OptimizerStep(optimizer, grad_clip=grad_clip, scaler=self._scaler)
        self.set_kernels(kernels)

    def set_kernels(self, kernels: KernelConfig) -> None:
        """Compute updates with these kernels from now on, uncompiled."""
        self.kernels = kernels
        self.is_compiled = False
        # Its gradients and weights first: there may be no room for those of two.
        self.__dict__.pop("_way", None)
        self._ending: CudaGraphOptimizerStep | None = None
        self.optimizer.zero_grad(set_to_none=True)
        self.backend: AutogradBackend | ManualBackend | CudaGraphBackend
        self.reducer = GradReducer()
        if kernels.manual_backward:
            self.backend = self._written_out(kernels)
            return
        gradients = LooseGrads()
        if self._root is not None:
            self.reducer = FSDPReducer(self._ranks)
        elif self._ranks.world_size > 1:
            gradients = self._gradients_in_a_row
            self.reducer = BucketedAllReduce(self._ranks, self._gradients_in_a_row)
            self._gradients_in_a_row.on_grads_ready = self.reducer.grads_ready
        self.backend = AutogradBackend(
            self.model,
            self.precision,
            kernels,
            scaler=self._scaler,
            savings=self._savings,
            gradients=gradients,
            root=self._root,
            world_size=self._ranks.world_size,
            compile_blocks=self._ranks.world_size > 1,
        )

    def _written_out(self, kernels: KernelConfig) -> ManualBackend:
        dtype, ranks = self.precision.dtype, self._ranks
        make = functools.partial(
            ManualBackend, self.model, dtype, savings=self._savings, kernels=kernels
        )
        if self._root is not None:
            way = make(
                weights=AllGatheredWeights(dtype, self._root, ranks),
                gradients=functools.partial(ShardedGradBuffer, ranks=ranks),
            )
            assert isinstance(way.grads, ShardedGradBuffer)
            self.reducer = BucketedReduceScatter(ranks, way.grads)
        else:
            way = make()
            if ranks.world_size > 1:
                self.reducer = BucketedAllReduce(ranks, way.grads)
        way.on_grads_ready = self.reducer.grads_ready
        return way

    @functools.cached_property
    def _gradients_in_a_row(self) -> AutogradGradBuffer:
        """Made once: what it hangs on the parameters stays there."""
        return AutogradGradBuffer(self.model)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has a piece of the model only."""
        return self._root is not None

    @property
    def root_module(self) -> nn.Module:
        """What gives the summed loss of inputs and targets in an evaluation."""
        return self.model if self._root is None else self._root

    def unsharded_model(self) -> GPT | None:
        """The model as one process can use it, on rank 0 only; all have to ask."""
        if self._root is not None:
            return gather_model(self.model, self.precision.dtype, self.device, self._ranks)
        return self.model if self._ranks.is_main else None

    @property
    def backend_name(self) -> str:
        """How an update is made, in words."""
        ways = {
            AutogradBackend: "autograd",
            ManualBackend: "written out",
            CudaGraphBackend: "written out, recorded",
        }
        return ways[type(self.backend)] + (", in shards" if self.is_sharded else "")

    def capture_cuda_graph(self, context_length: int) -> bool:
        """Play updates back from recordings from now on; whether there is memory for them.

        All are made here, and leave no trace but room for the optimizer's state. A recording has
        memory of its own, beside what an update takes that is not played back.
        """
        assert isinstance(self.backend, ManualBackend), "only what is written out can be recorded"
        assert self._root is None, "others would have to be waited for in a recording"
        # What is played back calls nobody: its gradients are sent when all are there.
        self.backend.on_grads_ready = GradReducer().grads_ready
        self.backend = CudaGraphBackend(self.backend)
        if type(self.optimizer) is AdamW and not self.precision.needs_scaler:
            self._ending = self.backend.capture_optimizer_step(self._optimizer_step)
        # The first one warms up, the second one is recorded.
        if not all(self.fits(self.micro_batch_size, context_length) for _ in range(2)):
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
        assert isinstance(self.backend, AutogradBackend), "there is nothing to compile"
        self.backend.compile()
        self.is_compiled = True

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Learn from one global batch, or this rank's part of it, both (G, T).

        An update whose gradient or loss is not finite is left out: weights and moments stay as they
        are.

        Returns:
            Mean loss over the tokens of all ranks, and gradient norm before clipping: scalars that
            stay on the device, so that nothing waits for them, and are the same on every rank.
        """
        if not self.root_module.training:
            # It asks every module by itself: as long as a hundred kernels take to launch.
            self.root_module.train()
        while (loss := self._gradients(inputs, targets)) is None:
            self._halve_micro_batch()
        if self._is_short:
            self._halve_micro_batch()
        if self._ending is not None:
            return loss, self._ending(loss, lr)
        norm = self._optimizer_step(self.backend.clip_grad_norm_, loss, lr)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """Gradients of a global batch in its parameters, and its loss; None if memory ran out."""
        loss = torch.zeros((), device=self.device)
        share = 1 / (targets.numel() * self._ranks.world_size)
        parts = list(
            zip(
                inputs.split(self.micro_batch_size),
                targets.split(self.micro_batch_size),
                strict=True,
            )
        )
        try:
            # Once it is there it stays. What it takes, a trial of micro-batches did not see.
            self.optimizer.init_state()
            self.reducer.reset()
            self.backend.zero_grad()
            # Each micro-batch counts by its tokens, so the split never changes the sum.
            for left, (x, y) in zip(reversed(range(len(parts))), parts, strict=True):
                if not left:
                    self.reducer.enable_sync()
                loss += self._forward_backward(x, y, share) * share
                self._ranks.tick()
        except torch.OutOfMemoryError:
            if not self._halve_on_oom or self.micro_batch_size == 1:
                raise
            if not self.reducer.has_sent():
                # Other ranks wait a little longer, and never hear of it.
                self.optimizer.zero_grad(set_to_none=True)
                return None
            self.reducer.poison()
            loss.fill_(math.nan)
            self._is_short = True
        return self.reducer.finish(loss)

    def _forward_backward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """Add `scale` times the gradients of a micro-batch's summed loss, which is returned."""
        return self.backend(x, y, scale)

    def _halve_micro_batch(self) -> None:
        """Halve the micro-batch, after memory ran out."""
        self._is_short = False
        if isinstance(self.backend, CudaGraphBackend):
            self.backend.release_graphs()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch_size = -(-self.micro_batch_size // 2)
        self._log(f"note: memory ran out; going on with micro-batches of {self.micro_batch_size}")

    def dry_run(self, batch_size: int, context_length: int) -> float:
        """Seconds for a forward and backward over some tokens, which leave no trace."""
        count = batch_size * context_length
        # Not all alike: adding up many gradients of one token takes far longer than of many.
        tokens = torch.arange(count, device=self.device) % self.model.config.vocab_size
        x = tokens.view(batch_size, context_length)
        self.root_module.train()
        with _kept_dice(self.device):
            synchronize(self.device)
            start = time.perf_counter()
            self.backend.zero_grad()
            self._forward_backward(x, x, 1 / count)
            synchronize(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def fits(self, batch_size: int, context_length: int) -> bool:
        """Whether so many windows go through the device's memory at once; tried out.

        Room is kept for AdamW's moments and for the copy that a save takes: 20 bytes a parameter.
        """
        kept = None
        try:
            if self.device.type == "cuda" and not self.optimizer.state:
                count = 20 * sum(p.numel() for p in self.model.parameters())
                kept = torch.empty(count, dtype=torch.uint8, device=self.device)
            self.dry_run(batch_size, context_length)
        except torch.OutOfMemoryError:
            fit = False
        else:
            fit = True
        del kept
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return fit

    def scaler_state_dict(self) -> dict[str, float]:
        """The loss scaler's state; empty where there is none."""
        return self._optimizer_step.scaler_state_dict()

    def load_scaler_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with a saved scale."""
        self._optimizer_step.load_scaler_state_dict(state)


@contextmanager
def _kept_dice(device: torch.device) -> Iterator[None]:
    """Put the random number generators back as they were: dropout must not notice a rehearsal."""
    devices = [device] if device.type == "cuda" else []
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)
