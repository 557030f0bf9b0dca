"""A model too large for one GPU: every rank keeps a piece of each tensor (FSDP2).

A block's weights are put together when it is their turn, in the narrow type of the products, and
dropped behind it; its gradients are added up, in float32, and cut to pieces as soon as they are
made. `gathered.py` has a faster way, for models that need not lie in pieces all the time.
After Zhao et al., "PyTorch FSDP" (2023), and Rajbhandari et al., "ZeRO" (2020). Weights and moments
stay float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptforge.checkpoint.state_dict import TIED_WEIGHT
from gptforge.device import Precision, free_memory
from gptforge.distributed import Comm
from gptforge.distributed.dtensor import gather_full_tensor, is_sharded
from gptforge.model import GPT
from gptforge.train.parallel.grad_reducer import GradReducer


class FSDPRoot(nn.Module):
    """The outermost layer of a sharded model: what is called goes through it, or finds no weights.

    Training calls `compute`, an evaluation the model itself.
    """

    train_forward: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor, num_tokens: int | None = None) -> Tensor:
        """The summed loss of (B, T) ids and targets; `num_tokens` as in `GPT.forward`."""
        if self.training:
            return self.train_forward(idx, targets)
        loss: Tensor = self.model(idx, targets, num_tokens)
        return loss

    def reshard_root(self) -> None:
        """Drop what an evaluation put together of this layer's own weights, and left so."""
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(self, FSDPModule), "shard() has seen it"
        self.reshard()


def apply_fsdp(model: GPT, precision: Precision, comm: Comm) -> FSDPRoot:
    """Cut a model's tensors to pieces, of which this rank keeps its own, on its device."""
    # Half a second to load: for those who shard.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = precision.dtype if precision.is_mixed else None
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
    mesh = comm.device_mesh()
    assert mesh is not None, "a process on its own has nobody to share with"
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = FSDPRoot(model)
    # The table is wanted at both ends of the model: it stays whole from one to the other.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return root


class FSDPReducer(GradReducer):
    """Gradients of a sharded model: it adds them up by itself, in every micro-batch.

    Waiting for the last one would save messages, and take the memory of whole gradients.
    """

    def __init__(self, ranks: Comm) -> None:
        self.world_size = ranks.world_size
        self._ranks = ranks

    def finish(self, loss: Tensor) -> Tensor:
        """As `GradientSync.finish`."""
        return self._ranks.all_reduce(loss)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """As torch's clip_grad_norm_, over the pieces on all ranks."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if is_sharded(norm):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gather_model(model: GPT, dtype: torch.dtype, device: torch.device, ranks: Comm) -> GPT | None:
    """A narrow copy of a sharded model to write with, on rank 0; None on the others."""
    pieces = ((n, t.detach().to(dtype)) for n, t in model.state_dict().items() if n != TIED_WEIGHT)
    tensors = {name: gather_full_tensor(piece, ranks) for name, piece in pieces}
    if not ranks.is_main:
        return None
    copy = GPT.on_meta(model.config)
    copy.load_state_dict({n: t for n, t in tensors.items() if t is not None}, False, assign=True)
    table = copy.get_parameter("transformer.wte.weight")
    copy.lm_head.weight = table
    size = sum(p.nbytes for p in copy.parameters())
    # Half as much again for what it remembers as it writes.
    has_room = (free_memory(device) or 0) > 1.5 * size
    return copy.to(device if has_room else "cpu").eval()
