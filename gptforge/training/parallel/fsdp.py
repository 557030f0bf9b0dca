"""FSDP2: every rank keeps a shard of each parameter, for models too large for one GPU.

A block's weights are all-gathered in the compute dtype when it runs and freed afterwards; its
gradients are reduce-scattered in fp32 as soon as they are ready. Master weights and optimizer state
stay fp32. After Zhao et al., "PyTorch FSDP" (2023), and Rajbhandari et al., "ZeRO" (2020).
`zero1.py` is faster where there is memory for all weights in the compute dtype.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptforge.checkpoint.state_dict import gather_on_rank0, untied_state_dict
from gptforge.device import Precision, free_memory
from gptforge.distributed import Comm
from gptforge.model import GPT


class FSDPRoot(nn.Module):
    """The root module: FSDP's hooks gather the weights only in calls that go through it."""

    train_forward: Callable[[Tensor, Tensor], Tensor]
    """(idx, targets) -> summed loss, in training mode."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor, num_tokens: int | None = None) -> Tensor:
        """Compute the summed loss; arguments as `GPT.forward`."""
        if self.training:
            return self.train_forward(idx, targets)
        loss: Tensor = self.model(idx, targets, num_tokens)
        return loss

    def reshard_root(self) -> None:
        """Free the root's gathered parameters, which stay allocated after an evaluation."""
        from torch.distributed.fsdp import FSDPModule

        assert isinstance(self, FSDPModule), "call apply_fsdp first"
        self.reshard()


def apply_fsdp(model: GPT, precision: Precision, comm: Comm) -> FSDPRoot:
    """Shard a model's parameters over the ranks; this rank keeps its shards on its device."""
    # The imports take half a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    param_dtype = precision.dtype if precision.is_mixed else None
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    kind = torch.device(comm.local_device).type
    mesh = init_device_mesh(kind, (comm.world_size,), mesh_dim_names=("ranks",))
    # One block per unit: the next block is gathered while this one runs, and the full weights of
    # only two exist at a time.
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    root = FSDPRoot(model)
    # The tied embedding is used at both ends of the model: keep it gathered in between.
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    return root


def gather_model(model: GPT, dtype: torch.dtype, device: torch.device, comm: Comm) -> GPT | None:
    """Copy a sharded model to rank 0, in `dtype`, for inference; returns None on other ranks."""
    shards = {name: shard.detach().to(dtype) for name, shard in untied_state_dict(model).items()}
    tensors = gather_on_rank0(shards, comm)
    if not comm.is_main:
        return None
    # On the meta device no weights are allocated or initialized: `assign` replaces them.
    with torch.device("meta"):
        copy = GPT(model.config)
    copy.load_state_dict(tensors, strict=False, assign=True)
    copy.lm_head.weight = copy.get_parameter("transformer.wte.weight")
    nbytes = sum(p.nbytes for p in copy.parameters())
    # 50% more for the KV cache and activations.
    fits = (free_memory(device) or 0) > 1.5 * nbytes
    return copy.to(device if fits else "cpu").eval()
