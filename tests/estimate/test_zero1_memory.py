"""`zero1_memory` against the tensors that one rank of ZeRO-1 holds, counted without other ranks."""

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptforge.config import Config
from gptforge.distributed import Comm
from gptforge.estimate.formulas import zero1_memory
from gptforge.kernels.attention import SavedAttention
from gptforge.model import GPT
from gptforge.training.backends import manual_layers
from gptforge.training.backends.manual import ManualBackend
from gptforge.training.parallel.zero1 import AllGatheredWeights, ShardedGradBuffer, padded_rows

LIBRARIES = 2**28
"""What the estimate adds for the workspaces of libraries, which have none on a CPU."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were created in the context and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def total(self) -> int:
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        return sum(nbytes for _, nbytes in self._storages.values())


class OneOf(Comm):
    """Rank 0 of several, without communication."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size


class Root(nn.Module):
    """A root module whose parameters are not sharded."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def reshard_root(self) -> None:
        pass


class FlashAttention:
    """Saves what flash attention does, and computes nothing."""

    def forward(self, qkv: Tensor, dropout: None) -> tuple[Tensor, SavedAttention]:
        B, T, _, H, D = qkv.shape  # noqa: N806
        out = qkv.new_zeros(B * T, H * D)
        return out, SavedAttention((qkv,), out.view(B, T, H, D), torch.zeros(B, H, T))


def build_rank(config: Config, world_size: int) -> tuple[ManualBackend, list[Tensor], LiveBytes]:
    """The backend of one rank, its shards of weights and AdamW's two moments, and their count."""
    model, comm, live = GPT(config.model), OneOf(world_size), LiveBytes()
    with live:
        shards = [
            p.new_empty(padded_rows(len(p), comm) // world_size, *p.shape[1:])
            for p in model.parameters()
            for _ in range(3)
        ]
        backend = ManualBackend(
            model,
            torch.bfloat16,
            weights=AllGatheredWeights(torch.bfloat16, Root(model), comm),
            make_grads=partial(ShardedGradBuffer, comm=comm),
        )
    return backend, shards, live


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    world_size=st.integers(2, 16),
    head_size=st.sampled_from([64, 80, 128]),
    config=st.builds(
        Config,
        n_head=st.integers(4, 16),
        n_layer=st.integers(1, 3),
        vocab_size=st.integers(16, 800).map(lambda n: 64 * n),
        block_size=st.integers(256, 2048),
        mlp_ratio=st.integers(2, 5),
    ),
)
def test_state_is_that_of_a_rank(config, head_size, world_size) -> None:
    config = dataclasses.replace(config, n_embd=config.n_head * head_size)
    with torch.device("meta"):
        backend, shards, live = build_rank(config, world_size)
    counted = live.total()
    del backend, shards
    estimate = zero1_memory(config, 0, world_size=world_size)
    # Counted for the position embedding, of which there is no copy in the compute dtype.
    extra = 2 * config.block_size * config.n_embd
    # Left out: padding, and the buffers that gather biases and norms, of the order of 1 / n_embd.
    assert (1 - 8 / config.n_embd) * counted < estimate - LIBRARIES <= counted + extra
    assert counted <= estimate


@pytest.mark.parametrize("sequences", [1, 6])
@pytest.mark.parametrize(("n_layer", "n_embd"), [(2, 128), (5, 640)])
def test_activations_are_what_a_forward_saves(n_layer, n_embd, sequences, monkeypatch) -> None:
    monkeypatch.setattr(manual_layers, "select_attention", lambda *_, **__: FlashAttention())
    config = Config(
        block_size=32, context_length=32, vocab_size=64, n_layer=n_layer, n_head=4, n_embd=n_embd
    )
    backend, shards, live = build_rank(config, 2)
    saved = [live.total()]

    def count_and_stop(*_: Tensor) -> None:
        saved.append(live.total())
        raise StopIteration

    monkeypatch.setattr(backend, "_lm_head", count_and_stop)
    idx = torch.zeros(sequences, 32, dtype=torch.long)
    with live, pytest.raises(StopIteration):
        backend.forward_backward(idx, idx, 1.0)
    estimate = zero1_memory(config, sequences, world_size=2)
    # The backward of a block, and the logits, come on top of what is saved.
    measured = saved[1] - saved[0]
    del shards
    assert measured < estimate - zero1_memory(config, 0, world_size=2) < 1.4 * measured
