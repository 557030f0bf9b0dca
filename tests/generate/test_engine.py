"""The engine against a plain loop over the model, which remembers nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.config import GPTConfig
from gptforge.inference.generate import TokenGenerator, window_start
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms, sample
from gptforge.model import GPT

SIZE = 50
SHAPE = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)


def model() -> GPT:
    made = GPT(SHAPE).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Larger than they are drawn, so that what came before matters.
        for parameter in made.parameters():
            parameter.mul_(6)
    return made.eval()


@torch.inference_mode()
def plain(model: GPT, prompt: list[int], dice: torch.Tensor, sampling: SamplingParams) -> list[int]:
    """Everything computed anew for each token."""
    row, start = list(prompt), 0
    for throw in dice:
        start = window_start(start, len(row), SHAPE.block_size)
        logits = model(torch.tensor([row[start:]]))[:, -1, :SIZE]
        row.append(int(sample(logits, throw[None], sampling)))
    return row[len(prompt) :]


def decoded(decoder: TokenGenerator, prompts, dice, sampling) -> list[list[int]]:
    steps = list(decoder.generate(prompts, dice, sampling))
    return [[i for chosen in steps for i in chosen.ids[row]] for row in range(len(prompts))]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from([SamplingParams(0), SamplingParams(1.0, 0, 1.0), SamplingParams(0.9, 10, 0.9)]),
)
def test_the_tokens_are_those_of_a_loop_without_a_cache(prompts, steps, sampling) -> None:
    # Prompts of different lengths at once, some beyond the context, some that grow beyond it.
    ours = model()
    dice = draw_uniforms(range(len(prompts)), steps)
    expected = [plain(ours, *pair, sampling) for pair in zip(prompts, dice, strict=True)]
    assert (
        decoded(TokenGenerator(InferenceModel(ours, vocab_size=SIZE)), prompts, dice, sampling)
        == expected
    )


def test_a_cache_holds_the_logits_of_the_whole() -> None:
    ours = model()
    engine = InferenceModel(ours, vocab_size=SIZE)
    ids = torch.randint(0, SIZE, (3, 16), generator=torch.Generator().manual_seed(1))
    cache, slots = engine.allocate_cache(3, 16), torch.arange(16)
    with torch.inference_mode():
        whole = ours(ids)[:, :, :SIZE]
        position = slots.expand(3, -1)
        for n in range(16):
            given = slice(0, 5) if n == 4 else slice(n, n + 1)
            if n < 4:
                continue
            seen = cache[..., : n + 1, :]
            got = engine.forward(ids[:, given], position[:, given], seen, slots[given], None)
            torch.testing.assert_close(got, whole[:, n], atol=1e-5, rtol=1e-5)


def test_probabilities_are_the_models_own_and_the_likeliest_come_in_order() -> None:
    ours, prompt = model(), [3, 1, 4]
    decoder = TokenGenerator(InferenceModel(ours, vocab_size=SIZE))
    steps = list(
        decoder.generate([prompt], draw_uniforms([0], 6), SamplingParams(2.0), top_logprobs=3)
    )
    row = list(prompt)
    for chosen in steps:
        with torch.inference_mode():
            known = ours(torch.tensor([row]))[0, -1, :SIZE].log_softmax(-1)
        [[token]] = chosen.ids
        assert chosen.top_ids[0, 0].tolist() == known.topk(3).indices.tolist()
        expected = torch.stack([known[token], *known.topk(3).values])
        torch.testing.assert_close(chosen.logprobs[0, 0], expected, atol=1e-5, rtol=1e-5)
        row.append(token)


def test_weights_that_change_are_seen_by_the_next_engine_and_shared_in_the_models_own_type() -> (
    None
):
    ours = model()
    engine = InferenceModel(ours, vocab_size=SIZE)
    assert engine.wte.data_ptr() == ours.lm_head.weight.data_ptr()
    with torch.no_grad():
        next(ours.blocks()).mlp.c_fc.weight.zero_()
    assert not engine.layers[0].c_fc.weight.any()
    narrow = InferenceModel(ours, vocab_size=SIZE, dtype=torch.bfloat16)
    assert narrow.layers[0].c_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_laid_out_for_speed_give_the_same_logits(dtype) -> None:
    shape = GPTConfig(block_size=16, vocab_size=SIZE, n_layer=2, n_head=4, n_embd=512)
    ours = GPT(shape).init_weights(torch.Generator().manual_seed(0)).eval()
    plain, settled = (
        InferenceModel(ours, vocab_size=SIZE, dtype=dtype, frozen=on) for on in (False, True)
    )
    if not settled.layers[0].c_fc.is_packed:
        pytest.skip("this torch, or this CPU, has no packed products")
    ids = torch.randint(0, SIZE, (2, 9), generator=torch.Generator().manual_seed(1))
    slots = torch.arange(9)
    logits = []
    with torch.inference_mode():
        for engine in (plain, settled):
            cache, places = engine.allocate_cache(2, 9), slots.expand(2, -1)
            engine.forward(ids[:, :8], places[:, :8], cache[..., :8, :], slots[:8], None)
            logits.append(engine.forward(ids[:, 8:], places[:, 8:], cache, slots[8:], None))
        exact = ours(ids)[:, -1]
    most = 1e-5 if dtype == torch.float32 else 3e-2
    for got in logits:
        assert (got.float() - exact).norm() <= most * exact.norm()


def test_a_machine_short_of_memory_keeps_one_copy_of_the_weights(monkeypatch) -> None:
    shape = GPTConfig(block_size=16, vocab_size=SIZE, n_layer=1, n_head=4, n_embd=512)
    ours = GPT(shape).init_weights(torch.Generator().manual_seed(0)).eval()
    monkeypatch.setattr("gptforge.inference.model.free_memory", lambda device: 10**6)
    engine = InferenceModel(ours, vocab_size=SIZE, frozen=True)
    assert engine.layers[0].c_fc.weight.data_ptr() == next(ours.blocks()).mlp.c_fc.weight.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize(
    "sampling", [SamplingParams(0), SamplingParams(1.0, 0, 1.0), SamplingParams(0.9, 10, 0.9)]
)
def test_a_captured_step_writes_what_single_steps_write(sampling) -> None:
    ours = model().cuda()
    prompts, dice = [[1, 2, 3], [5], [7, 8]], draw_uniforms([1, 2, 3], 60)
    captured = TokenGenerator(InferenceModel(ours, vocab_size=SIZE), cuda_graph=True)
    single = TokenGenerator(InferenceModel(ours, vocab_size=SIZE))
    expected = decoded(single, prompts, dice, sampling)
    assert decoded(captured, prompts, dice, sampling) == expected
    assert decoded(captured, prompts, dice, sampling) == expected
    assert captured.has_cuda_graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settled", [False, True])
def test_logits_are_float32_so_that_the_likeliest_is_one(dtype, settled, device) -> None:
    """Rounded to bfloat16, one position in a hundred has several that are likeliest."""
    shape = GPTConfig(block_size=16, vocab_size=4096, n_layer=1, n_head=2, n_embd=64)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(0)).to(device).eval()
    engine = InferenceModel(model, vocab_size=4000, dtype=dtype, frozen=settled)
    dice = torch.Generator().manual_seed(1)
    hidden = torch.randn(2000, 64, generator=dice).to(device, dtype)
    logits = engine.logits(hidden)
    assert (logits.dtype, logits.shape) == (torch.float32, (2000, 4000))
    exact = hidden.double() @ model.lm_head.weight[:4000].double().t()
    # On a GPU the weights themselves are rounded.
    near = 1e-5 if device.type == "cpu" or dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.double(), exact, rtol=near, atol=near)
    top = logits.topk(2).values
    assert int((top[:, 0] == top[:, 1]).sum()) == 0
    rounded = logits.bfloat16().topk(2).values
    assert int((rounded[:, 0] == rounded[:, 1]).sum()) > 20
    slots, ids = torch.arange(3, device=device), torch.zeros(1, 3, dtype=torch.long, device=device)
    with torch.inference_mode():
        written = engine.forward(ids, slots[None], engine.allocate_cache(1, 3), slots, None)
    assert written.dtype == torch.float32
