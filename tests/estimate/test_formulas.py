import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.config import Config, GPTConfig
from gptforge.estimate import formulas
from gptforge.model import GPT
from gptforge.presets import get_preset

shapes = st.builds(
    lambda heads, head_size, **rest: GPTConfig(n_head=heads, n_embd=heads * head_size, **rest),
    heads=st.integers(1, 4),
    head_size=st.integers(1, 8),
    block_size=st.integers(1, 32),
    vocab_size=st.integers(1, 99),
    n_layer=st.integers(1, 3),
    mlp_ratio=st.integers(1, 5),
)


def total_memory(config: Config, sequences: int, **options: bool) -> int:
    return sum(formulas.training_memory(config, sequences, **options).values())


@settings(max_examples=30)
@given(shapes)
def test_num_params_counts_the_model_s(shape: GPTConfig) -> None:
    assert formulas.num_params(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_activation_memory_is_what_autograd_saves() -> None:
    # Wide enough for the large terms to dominate; float32, as on a CPU.
    config = Config(
        block_size=64, context_length=64, vocab_size=512, n_layer=3, n_head=4, n_embd=64
    )
    saved: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model = GPT(config.model).init_weights()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    idx = torch.randint(0, 512, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(idx, idx)
        measured = sum(size for address, size in saved.items() if address not in weights)
    assert loss.isfinite()
    estimate = total_memory(config, 4, mixed_precision=False)
    estimate -= total_memory(config, 0, mixed_precision=False)
    assert 0.9 * measured < estimate < 1.5 * measured


def test_activations_are_smaller_in_mixed_precision_and_with_checkpointing() -> None:
    config = dataclasses.replace(get_preset("gpt2"), vocab_size=50304)
    checkpointing = dataclasses.replace(config, activation_checkpointing=True)
    half = formulas.training_memory(config, 1, mixed_precision=True)["activations"]
    full = formulas.training_memory(config, 1, mixed_precision=False)["activations"]
    less = formulas.training_memory(checkpointing, 1, mixed_precision=False)["activations"]
    assert half < full and less < full


def test_flops_of_gpt2_small_by_the_published_convention() -> None:
    small = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    assert formulas.flops_per_token(small, 1024) == 6 * 124_475_904 + 12 * 12 * 768 * 1024


def test_fsdp_memory_shrinks_with_the_number_of_ranks() -> None:
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304)
    checkpointing = dataclasses.replace(config, activation_checkpointing=True)

    def memory(config: Config, sequences: int, ranks: int) -> int:
        return formulas.fsdp_memory(config, sequences, world_size=ranks, mixed_precision=True)

    state = 16 * formulas.num_params(config.model)
    one, two, four = (memory(config, 4, ranks) for ranks in (1, 2, 4))
    assert one - two == state // 2
    assert two - four == state // 4
    eight = memory(config, 8, 4)
    assert four < eight and memory(checkpointing, 8, 4) < eight
    assert four < 0.6 * total_memory(config, 4, mixed_precision=True)


def test_teachers_take_memory_for_their_weights_and_logits() -> None:
    config = dataclasses.replace(get_preset("debug"), vocab_size=64)
    for options in ({"mixed_precision": False}, {"mixed_precision": True, "manual_backward": True}):
        alone, one, two = (
            total_memory(dataclasses.replace(config, teachers=k), 4, **options) for k in range(3)
        )
        weights = formulas.training_memory(config, 4, **options)["weights"]
        assert one - alone > weights and two - one > weights
