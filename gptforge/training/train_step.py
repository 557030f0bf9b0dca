"""One optimizer step: forward and backward over micro-batches, reduction, clipping, update."""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gptforge.config import Config
from gptforge.device import Precision
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.model import GPT
from gptforge.optim.ema import WeightEMA
from gptforge.optim.optimizer import Optimizer
from gptforge.training.backends.autograd import AutogradBackend
from gptforge.training.backends.cuda_graph import CudaGraphBackend, CudaGraphOptimizerStep
from gptforge.training.backends.float8 import Float8Backend
from gptforge.training.backends.manual import ManualBackend
from gptforge.training.backends.manual_layers import grad_groups
from gptforge.training.distillation import Distillation
from gptforge.training.dry_run import fits_memory
from gptforge.training.grad_buffer import AutogradGradBuffer
from gptforge.training.optimizer_step import optimizer_step
from gptforge.training.parallel.fsdp import FSDPRoot, gather_model
from gptforge.training.parallel.grad_reducer import BucketedAllReduce, GradReducer
from gptforge.training.parallel.zero1 import (
    AllGatheredWeights,
    BucketedReduceScatter,
    ShardedGradBuffer,
)

logger = logging.getLogger(__name__)


class TrainStep:
    """A model and its optimizer, with a backend that computes gradients.

    Args:
        model: the plain module, whose weights are trained.
        optimizer: over the model's parameters; its learning rate is set at each step.
        config: sequences in a micro-batch (`batch_size`), `grad_clip`, `activation_checkpointing`,
            `loss_chunk` and `ema`.
        precision: compute dtype of the matmuls.
        kernels: the kernels to use where there is a choice.
        halve_on_oom: on an out-of-memory error, halve the micro-batch size and try again.
        comm: the ranks; each gets an equal slice of a global batch.
        root: the root module, if FSDP shards the model.
        distillation: teachers to learn from besides the targets; not with `root`.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: Optimizer,
        config: Config,
        *,
        precision: Precision,
        kernels: KernelConfig = DEFAULT_KERNELS,
        halve_on_oom: bool = False,
        comm: Comm = SINGLE_PROCESS,
        root: FSDPRoot | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        assert root is None or not halve_on_oom, "FSDP cannot retry: the other ranks would hang"
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.device = next(model.parameters()).device
        self.micro_batch_size = config.batch_size
        # With an infinite maximum the norm is still computed: it is logged, and checked.
        self._max_norm = config.grad_clip if config.grad_clip > 0 else math.inf
        self._halve_on_oom, self._comm, self._root = halve_on_oom, comm, root
        self.ema = WeightEMA(model, config.ema) if config.ema else None
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)
        self._backend_options: dict[str, Any] = {
            "activation_checkpointing": config.activation_checkpointing,
            "loss_chunk": config.loss_chunk,
            "distillation": distillation,
        }
        self.set_kernels(kernels)

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> tuple[Tensor, Tensor]:
        """Train on this rank's slice of a global batch.

        A step whose loss or gradient is not finite is skipped: weights and optimizer state stay
        unchanged.

        Args:
            inputs: (G, T) token ids.
            targets: (G, T) next token ids.
            lr: learning rate.

        Returns:
            The mean cross-entropy of the targets over the tokens of all ranks, and the gradient
            norm before clipping; both scalars stay on the device, so this call does not sync.
        """
        if not self.root_module.training:
            # train() visits every module, which takes as long as launching a hundred kernels.
            self.root_module.train()
        loss = torch.zeros((), device=self.device)
        # Divide by the tokens of the global batch, so that neither the number of micro-batches nor
        # that of ranks changes the gradient. All ranks have the same number of tokens.
        scale = 1 / (targets.numel() * self._comm.world_size)
        size, is_oom = self.micro_batch_size, False
        micro_batches = list(zip(inputs.split(size), targets.split(size), strict=True))
        try:
            # Inside the try: allocating the optimizer's state may run out of memory too.
            self.optimizer.init_state()
            self.reducer.reset()
            self.backend.zero_grad()
            for i, (x, y) in enumerate(micro_batches):
                if i == len(micro_batches) - 1:
                    self.reducer.enable_sync()  # all-reduce only with the last micro-batch
                # The backend returns a sum over tokens, and scales the gradients itself.
                loss += self.backend.forward_backward(x, y, scale) * scale
                self._comm.tick()
        except torch.OutOfMemoryError:
            if not self._halve_on_oom or self.micro_batch_size == 1:
                raise
            # Retried outside the except block, whose traceback keeps activations alive.
            is_oom = True
        if is_oom and not self.reducer.has_sent():
            # No collective has started: the other ranks just wait longer in their next one.
            self.optimizer.zero_grad()
            self._halve_micro_batch()
            return self(inputs, targets, lr=lr)
        if is_oom:
            # Part of the gradients is already reduced: all ranks skip this step.
            self.reducer.poison()
            loss.fill_(math.nan)
        loss = self.reducer.finish(loss)
        if is_oom:
            self._halve_micro_batch()
        grad_norm = self._optimizer_step(lr, loss)  # skipped on the device if not finite
        if self.ema is not None:
            self.ema.num_updates += 1
        return loss, grad_norm

    def set_kernels(self, kernels: KernelConfig) -> None:
        """Build the backend for these kernels, uncompiled and without CUDA graphs."""
        self.kernels, self.is_compiled = kernels, False
        # Free the old backend first: there may be no memory for two.
        for name in ("backend", "reducer", "_optimizer_step"):
            self.__dict__.pop(name, None)
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            # Cached blocks of the old backend's sizes would fragment memory.
            torch.cuda.empty_cache()
        self.reducer: GradReducer
        backend, self.reducer = self._build_backend(kernels)
        self.backend: AutogradBackend | ManualBackend | CudaGraphBackend = backend
        self._optimizer_step: Callable[..., Tensor] = functools.partial(
            optimizer_step, self.optimizer, backend, self._scaler, self.ema, self._max_norm
        )

    def _build_backend(
        self, kernels: KernelConfig
    ) -> tuple[AutogradBackend | ManualBackend, GradReducer]:
        """Build the backend that `kernels` names, and the gradient reduction that goes with it.

        | ranks | autograd | manual backward |
        | --- | --- | --- |
        | one | gradients where autograd puts them | gradient buffer |
        | several | gradient buffer, all-reduced | gradient buffer, all-reduced |
        | several, sharded | FSDP | ZeRO-1 |
        """
        comm, root, dtype = self._comm, self._root, self.precision.dtype
        reducer = GradReducer(comm)
        if not kernels.manual_backward:
            grads = None
            if root is None and comm.world_size > 1:
                grads = self._autograd_grads
                reducer = BucketedAllReduce(comm, grads)
                grads.on_grads_ready = reducer.grads_ready
            autograd = AutogradBackend(
                self.model, self.precision, kernels, scaler=self._scaler, grads=grads, root=root,
                world_size=comm.world_size, **self._backend_options,
            )  # fmt: skip
            return autograd, reducer

        backend_class = Float8Backend if kernels.float8 else ManualBackend
        if root is not None:
            weights = AllGatheredWeights(dtype, root, comm)
            make_grads = functools.partial(ShardedGradBuffer, comm=comm)
            manual = backend_class(
                self.model, dtype, weights=weights, make_grads=make_grads, **self._backend_options
            )
            assert isinstance(manual.grads, ShardedGradBuffer)
            reducer = BucketedReduceScatter(comm, manual.grads)
        else:
            manual = backend_class(self.model, dtype, **self._backend_options)
            if comm.world_size > 1:
                reducer = BucketedAllReduce(comm, manual.grads)
        manual.on_grads_ready = reducer.grads_ready
        return manual, reducer

    @functools.cached_property
    def _autograd_grads(self) -> AutogradGradBuffer:
        # Built once, if at all: the hooks that it registers on the parameters are not removed.
        return AutogradGradBuffer([p for group in grad_groups(self.model) for p in group])

    @property
    def backend_name(self) -> str:
        """The backend, for messages."""
        return self.backend.name + (", sharded" if self.is_sharded else "")

    @property
    def is_sharded(self) -> bool:
        """Whether each rank has only a shard of the model."""
        return self._root is not None

    @property
    def root_module(self) -> nn.Module:
        """Module for evaluation: (inputs, targets) to the summed loss."""
        return self.model if self._root is None else self._root

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the block, the model has the weights to evaluate and save: the EMA, if any."""
        with nullcontext() if self.ema is None else self.ema.swap():
            yield
            if self._root is not None:
                self._root.reshard_root()  # or the next step would compute with those it gathered

    @property
    def raw_weights(self) -> Mapping[str, Tensor]:
        """Within `ema_weights`, the weights that are trained; empty if those are the model's."""
        return {} if self.ema is None else self.ema.tensors

    def unsharded_model(self) -> GPT | None:
        """Return the model for inference on rank 0, None on other ranks; a collective."""
        if self._root is not None:
            return gather_model(self.model, self.precision.dtype, self.device, self._comm)
        return self.model if self._comm.is_main else None

    def compile(self) -> None:
        """Run the model through torch.compile from now on."""
        assert isinstance(self.backend, AutogradBackend), "there is nothing to compile"
        self.backend.compile()
        self.is_compiled = True

    def capture_cuda_graph(self, context_length: int) -> bool:
        """Replay steps as CUDA graphs from now on; returns False if a rank lacks memory for them.

        All graphs are captured here; the only side effect is that the optimizer's state is
        allocated. Their private memory pools come on top of the memory of an eager step. If the
        optimizer already has state, its graph is captured in the next two steps instead: a trial
        here would update the EMA of the weights.
        """
        manual = self.backend
        assert isinstance(manual, ManualBackend), "only the manual backward can be captured"
        assert self._root is None, "a graph cannot wait for other ranks"
        assert not self.precision.needs_scaler, "the manual backward scales no loss"
        # Collectives are not captured, so they cannot overlap with a replay: they all run after it.
        manual.on_grads_ready = lambda num_groups: None
        self.backend = CudaGraphBackend(manual)
        self._optimizer_step = CudaGraphOptimizerStep(self._optimizer_step, manual, self.ema)
        # The first call warms up, the second one is captured.
        captured = all(fits_memory(self, self.micro_batch_size, context_length) for _ in range(2))
        if captured and not self.optimizer.state:
            try:
                for _ in range(2):
                    # With a loss of NaN the step is skipped, so weights and state do not change.
                    self._optimizer_step(0.0, torch.full((), math.nan, device=self.device))
            except torch.OutOfMemoryError:
                captured = False
        captured = self._comm.all_true(captured)
        if not captured:
            del manual  # or its buffers would stay while those of the new backend are allocated
            self.set_kernels(self.kernels)
        return captured

    def scaler_state_dict(self) -> dict[str, float]:
        """The loss scaler's state; empty where there is none."""
        return {name: float(value) for name, value in self._scaler.state_dict().items()}

    def load_scaler_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the loss scaler's state."""
        if state and self._scaler.is_enabled():
            # `scaler_state_dict` made these floats, and GradScaler's kernel takes ints.
            ints = {name: int(state[name]) for name in ("growth_interval", "_growth_tracker")}
            self._scaler.load_state_dict({**state, **ints})

    def _halve_micro_batch(self) -> None:
        if isinstance(self.backend, CudaGraphBackend):
            self.backend.release_graphs()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch_size = -(-self.micro_batch_size // 2)
        label = "" if self._comm.is_main else f"{self._comm.label}: "
        logger.warning(
            f"{label}note: out of memory; continuing with micro-batches of {self.micro_batch_size}",
            extra={"any_rank": True},
        )
