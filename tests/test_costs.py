from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge import costs
from gptforge.config import GPTConfig
from gptforge.model import GPT

shapes = st.builds(
    lambda heads, width, **rest: GPTConfig(n_head=heads, n_embd=heads * width, **rest),
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
    block_size=st.integers(1, 32),
    vocab_size=st.integers(1, 99),
    n_layer=st.integers(1, 3),
    mlp_ratio=st.integers(1, 5),
)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_the_formula_counts_what_the_model_has(shape: GPTConfig) -> None:
    assert costs.parameters(shape) == sum(p.numel() for p in GPT(shape).parameters())


def test_flops_of_gpt2_small_by_the_published_convention() -> None:
    small = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
    assert costs.flops_per_token(small, 1024) == 6 * 124_475_904 + 12 * 12 * 768 * 1024
