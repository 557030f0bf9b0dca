import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.config import GPTConfig
from gptforge.estimate import formulas
from gptforge.model import GPT
from gptforge.presets import get_preset

shapes = st.builds(
    lambda heads, width, **rest: GPTConfig(n_head=heads, n_embd=heads * width, **rest),
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
    block_size=st.integers(1, 32),
    vocab_size=st.integers(1, 99),
    n_layer=st.integers(1, 3),
    mlp_ratio=st.integers(1, 5),
)


def whole_of(*what: object, **how: object) -> int:
    return sum(formulas.training_memory(*what, **how).values())


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_the_formula_counts_what_the_model_has(shape: GPTConfig) -> None:
    assert formulas.num_params(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_memory_for_the_backward_pass_is_what_autograd_keeps() -> None:
    # Wide enough that the large terms rule; float32, as on a CPU.
    shape = GPTConfig(block_size=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64)
    windows, length = 4, 64
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = GPT(shape)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    idx = torch.randint(0, 512, (windows, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(idx, idx)
        measured = sum(size for place, size in kept.items() if place not in weights)
    assert loss.isfinite()
    whole = whole_of(shape, length, windows, mixed=False)
    estimate = whole - whole_of(shape, length, 0, mixed=False)
    assert 0.9 * measured < estimate < 1.5 * measured


def test_flops_of_gpt2_small_by_the_published_convention() -> None:
    small = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    assert formulas.flops_per_token(small, 1024) == 6 * 124_475_904 + 12 * 12 * 768 * 1024


def test_shards_take_less_memory_the_more_ranks_share_them() -> None:
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304).model
    state = 16 * formulas.num_params(config)
    one, two, four = (
        formulas.fsdp_memory(config, 1024, 4, world_size=ranks, mixed_precision=True)
        for ranks in (1, 2, 4)
    )
    assert one - two == state // 2
    assert two - four == state // 4
    eight = formulas.fsdp_memory(config, 1024, 8, world_size=4, mixed_precision=True)
    recomputed = formulas.fsdp_memory(
        config, 1024, 8, world_size=4, mixed_precision=True, activation_checkpointing=True
    )
    assert four < recomputed < eight or recomputed < four < eight
    whole = whole_of(config, 1024, 4, mixed=True)
    assert four < 0.6 * whole
