"""Select the backend, and the gradient reduction that goes with it."""

import functools
from collections.abc import Callable

import torch

from gptforge.device import Precision
from gptforge.distributed import Comm
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.training.backends.autograd import AutogradBackend
from gptforge.training.backends.float8 import Float8Backend
from gptforge.training.backends.manual import ManualBackend
from gptforge.training.distillation import Distillation
from gptforge.training.grad_buffer import AutogradGradBuffer
from gptforge.training.parallel.fsdp import FSDPRoot
from gptforge.training.parallel.grad_reducer import BucketedAllReduce, GradReducer
from gptforge.training.parallel.zero1 import (
    AllGatheredWeights,
    BucketedReduceScatter,
    ShardedGradBuffer,
)


def build_backend(
    model: GPT,
    precision: Precision,
    kernels: KernelConfig,
    *,
    scaler: torch.amp.GradScaler,
    activation_checkpointing: bool,
    loss_chunk: int,
    comm: Comm,
    root: FSDPRoot | None,
    autograd_grads: Callable[[], AutogradGradBuffer],
    distillation: Distillation | None,
) -> tuple[AutogradBackend | ManualBackend, GradReducer]:
    """Build the backend that `kernels` names, and its reducer.

    | ranks | autograd | manual backward |
    | --- | --- | --- |
    | one | gradients where autograd puts them | gradient buffer |
    | several | gradient buffer, all-reduced | gradient buffer, all-reduced |
    | several, sharded | FSDP | ZeRO-1 |

    See `TrainStep` for the arguments; `autograd_grads` returns the buffer for autograd with
    several ranks.
    """
    reducer = GradReducer(comm)
    if not kernels.manual_backward:
        grads = None
        if root is None and comm.world_size > 1:
            grads = autograd_grads()
            reducer = BucketedAllReduce(comm, grads)
            grads.on_grads_ready = reducer.grads_ready
        autograd = AutogradBackend(
            model,
            precision,
            kernels,
            scaler=scaler,
            activation_checkpointing=activation_checkpointing,
            loss_chunk=loss_chunk,
            grads=grads,
            root=root,
            world_size=comm.world_size,
            distillation=distillation,
        )
        return autograd, reducer

    build = functools.partial(
        Float8Backend if kernels.float8 else ManualBackend,
        model,
        precision.dtype,
        activation_checkpointing=activation_checkpointing,
        loss_chunk=loss_chunk,
        distillation=distillation,
    )
    if root is not None:
        manual = build(
            weights=AllGatheredWeights(precision.dtype, root, comm),
            make_grads=functools.partial(ShardedGradBuffer, comm=comm),
        )
        assert isinstance(manual.grads, ShardedGradBuffer)
        reducer = BucketedReduceScatter(comm, manual.grads)
    else:
        manual = build()
        if comm.world_size > 1:
            reducer = BucketedAllReduce(comm, manual.grads)
    manual.on_grads_ready = reducer.grads_ready
    return manual, reducer
