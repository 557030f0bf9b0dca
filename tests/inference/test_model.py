"""InferenceModel and TokenGenerator against a loop over the plain model without a cache."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.config import GPTConfig
from gptforge.inference.decode_session import DecodeSession
from gptforge.inference.generate import TokenGenerator, window_start
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms, sample
from gptforge.model import GPT

VOCAB = 50
CONFIG = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)
SAMPLINGS = [SamplingParams(0), SamplingParams(1.0, 0, 1.0), SamplingParams(0.9, 10, 0.9)]


def init_gpt(config: GPTConfig) -> GPT:
    return GPT(config).init_weights(torch.Generator().manual_seed(0)).eval()


def gpt() -> GPT:
    model = init_gpt(CONFIG)
    with torch.no_grad():
        # Larger than at initialization, so that the context matters.
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@torch.inference_mode()
def without_cache(
    model: GPT, prompt: list[int], uniforms: torch.Tensor, sampling: SamplingParams
) -> list[int]:
    """Recompute the whole context for each token."""
    ids, start = list(prompt), 0
    for uniform in uniforms:
        start = window_start(start, len(ids), CONFIG.block_size)
        logits = model(torch.tensor([ids[start:]]))[:, -1, :VOCAB]
        ids.append(int(sample(logits, uniform[None], sampling)))
    return ids[len(prompt) :]


def generated(generator: TokenGenerator, prompts, uniforms, sampling) -> list[list[int]]:
    steps = list(generator.generate(prompts, uniforms, sampling))
    return [[i for step in steps for i in step.ids[row]] for row in range(len(prompts))]


@settings(max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=4),
    st.integers(1, 40),
    st.sampled_from(SAMPLINGS),
)
def test_tokens_are_those_of_a_loop_without_a_cache(prompts, steps, sampling) -> None:
    # Prompts of different lengths in a batch, some longer than the context, some growing beyond it.
    model = gpt()
    uniforms = draw_uniforms(range(len(prompts)), steps)
    pairs = zip(prompts, uniforms, strict=True)
    expected = [without_cache(model, *pair, sampling) for pair in pairs]
    generator = TokenGenerator(InferenceModel(model, vocab_size=VOCAB))
    assert generated(generator, prompts, uniforms, sampling) == expected


def test_logits_with_a_cache_are_those_of_the_full_sequence() -> None:
    weights = gpt()
    model = InferenceModel(weights, vocab_size=VOCAB)
    ids = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    cache, slots = model.allocate_cache(3, 16), torch.arange(16)
    with torch.inference_mode():
        expected = weights(ids)[:, :, :VOCAB]
        positions = slots.expand(3, -1)
        for n in range(4, 16):
            new = slice(0, 5) if n == 4 else slice(n, n + 1)
            logits = model.forward(
                ids[:, new], positions[:, new], cache.prefix(n + 1), slots[new], None
            )
            torch.testing.assert_close(logits, expected[:, n], atol=1e-5, rtol=1e-5)


def test_logprobs_are_the_models_and_top_logprobs_are_sorted() -> None:
    model, prompt = gpt(), [3, 1, 4]
    generator = TokenGenerator(InferenceModel(model, vocab_size=VOCAB))
    uniforms = draw_uniforms([0], 6)
    ids = list(prompt)
    for step in generator.generate([prompt], uniforms, SamplingParams(2.0), top_logprobs=3):
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids]))[0, -1, :VOCAB].log_softmax(-1)
        [[token]] = step.ids
        assert step.top_ids[0, 0].tolist() == logprobs.topk(3).indices.tolist()
        expected = torch.stack([logprobs[token], *logprobs.topk(3).values])
        torch.testing.assert_close(step.logprobs[0, 0], expected, atol=1e-5, rtol=1e-5)
        ids.append(token)


def test_weights_are_shared_unless_the_dtype_differs() -> None:
    weights = gpt()
    model = InferenceModel(weights, vocab_size=VOCAB)
    assert model.wte.data_ptr() == weights.lm_head.weight.data_ptr()
    with torch.no_grad():
        next(weights.blocks()).mlp.c_fc.weight.zero_()
    assert not model.layers[0].c_fc.weight.any()
    bfloat16 = InferenceModel(weights, vocab_size=VOCAB, dtype=torch.bfloat16)
    assert bfloat16.layers[0].c_fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_logits(dtype) -> None:
    config = GPTConfig(block_size=16, vocab_size=VOCAB, n_layer=2, n_head=4, n_embd=512)
    weights = init_gpt(config)
    plain, packed = (
        InferenceModel(weights, vocab_size=VOCAB, dtype=dtype, frozen=frozen)
        for frozen in (False, True)
    )
    if not packed.layers[0].c_fc.is_packed:
        pytest.skip("this torch, or this CPU, has no packed linear layers")
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    slots = torch.arange(9)
    positions = slots.expand(2, -1)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.inference_mode():
        exact = weights(ids)[:, -1]
        for model in (plain, packed):
            cache = model.allocate_cache(2, 9)
            model.forward(ids[:, :8], positions[:, :8], cache.prefix(8), slots[:8], None)
            logits = model.forward(ids[:, 8:], positions[:, 8:], cache, slots[8:], None)
            assert (logits.float() - exact).norm() <= tolerance * exact.norm()


def test_weights_are_not_copied_where_memory_is_short(monkeypatch) -> None:
    config = GPTConfig(block_size=16, vocab_size=VOCAB, n_layer=1, n_head=4, n_embd=512)
    weights = init_gpt(config)
    monkeypatch.setattr("gptforge.inference.model.free_memory", lambda device: 10**6)
    model = InferenceModel(weights, vocab_size=VOCAB, frozen=True)
    c_fc = next(weights.blocks()).mlp.c_fc
    assert model.layers[0].c_fc.weight.data_ptr() == c_fc.weight.data_ptr()


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[2]])
@pytest.mark.parametrize("kernel", ["right", "wrong", "does not compile"])
def test_a_sampling_kernel_is_used_if_it_works(monkeypatch, kernel, sampling) -> None:
    calls = 0

    def sample_top_k(
        logits, uniforms, counters, *, ids, token_ids, temperature, top_k, top_p
    ) -> None:
        nonlocal calls
        calls += 1
        if kernel == "does not compile":
            raise ImportError("no Triton")
        params = SamplingParams(temperature, top_k, top_p)
        step = int(counters[0])
        right = sample(logits, uniforms[:, step], params)
        ids[:, 0] = token_ids[:, step, 0] = right + (kernel == "wrong")
        counters += 1

    monkeypatch.setattr("gptforge.inference.decode_session.sample_top_k", sample_top_k)
    monkeypatch.setattr(
        "gptforge.inference.decode_session.supports_sample_top_k", lambda *args: True
    )
    model = InferenceModel(gpt(), vocab_size=VOCAB)
    prompts, uniforms = [[1, 2, 3], [5]], draw_uniforms([1, 2], 8)
    expected = generated(TokenGenerator(model), prompts, uniforms, sampling)
    assert calls == 0
    generator = TokenGenerator(model)
    generator.cuda_graph = True  # there is none on a CPU, but the sampler is chosen as for one
    assert generated(generator, prompts, uniforms, sampling) == expected
    # One call to check it, then one for each step.
    assert calls == (9 if kernel == "right" else 1)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 11, 16])
@torch.inference_mode()
def test_prompts_padded_for_a_graph_give_the_same_tokens(monkeypatch, length) -> None:
    captured = []

    def stand_in(self: DecodeSession, step: Callable[[], None]) -> SimpleNamespace:
        captured.append(step)
        return SimpleNamespace(replay=step)

    monkeypatch.setattr(DecodeSession, "_capture", stand_in)
    model, steps = gpt(), CONFIG.block_size - length + 1
    session = DecodeSession(
        InferenceModel(model, vocab_size=VOCAB), batch_size=2, max_seq_length=16,
        max_new_tokens=steps, sampling=SamplingParams(),
    )  # fmt: skip
    session._graph = session._capture_decode()
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        prompts = torch.randint(0, VOCAB, (2, length), generator=rng).tolist()
        uniforms = draw_uniforms([seed, seed + 5], steps)
        session.reset(uniforms)
        session.prefill(prompts)
        session.decode(steps - 1)
        ids, _ = session.read_tokens(0, steps)()
        for row in range(2):
            expected = without_cache(model, prompts[row], uniforms[row], SamplingParams())
            assert ids[row, :, 0].tolist() == expected
    assert len(captured) == 2  # the decode step, and at its second use the prefill


def test_a_session_is_reused_after_an_early_stop(monkeypatch) -> None:
    sessions = []

    class Session(DecodeSession):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.has_cuda_graph = True  # only these are kept
            sessions.append(self)

    monkeypatch.setattr("gptforge.inference.generate.DecodeSession", Session)
    model, uniforms = InferenceModel(gpt(), vocab_size=VOCAB), draw_uniforms([1], 20)
    expected = generated(TokenGenerator(model), [[1, 2]], uniforms, SAMPLINGS[0])
    generator = TokenGenerator(model)
    for _ in range(2):
        steps = generator.generate([[3, 4]], uniforms, SAMPLINGS[0])
        next(steps), next(steps)
        steps.close()
    assert generated(generator, [[1, 2]], uniforms, SAMPLINGS[0]) == expected
    assert len(sessions) == 2  # one of each generator


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompts", [[[1, 2, 3], [5], [7, 8]], [[1, 2, 3], [5, 2, 9], [7, 8, 4]]])
def test_a_cuda_graph_gives_the_same_tokens(sampling, prompts) -> None:
    weights = gpt().cuda()
    uniforms = draw_uniforms([1, 2, 3], 60)
    graph = TokenGenerator(InferenceModel(weights, vocab_size=VOCAB), cuda_graph=True)
    eager = TokenGenerator(InferenceModel(weights, vocab_size=VOCAB))
    expected = generated(eager, prompts, uniforms, sampling)
    for _ in range(3):
        assert generated(graph, prompts, uniforms, sampling) == expected
    assert graph.has_cuda_graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_float32_without_ties(dtype, frozen, device) -> None:
    """Rounded to bfloat16, one position in a hundred has several largest logits."""
    config = GPTConfig(block_size=16, vocab_size=4096, n_layer=1, n_head=2, n_embd=64)
    weights = init_gpt(config).to(device)
    model = InferenceModel(weights, vocab_size=4000, dtype=dtype, frozen=frozen)
    hidden = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    logits = model.logits(hidden)
    assert (logits.dtype, logits.shape) == (torch.float32, (2000, 4000))
    exact = hidden.double() @ weights.lm_head.weight[:4000].double().t()
    # On a GPU the weights themselves are rounded.
    tolerance = 1e-5 if device.type == "cpu" or dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.double(), exact, rtol=tolerance, atol=tolerance)
    top = logits.topk(2).values
    assert int((top[:, 0] == top[:, 1]).sum()) == 0
    rounded = logits.bfloat16().topk(2).values
    assert int((rounded[:, 0] == rounded[:, 1]).sum()) > 20
    slots, ids = torch.arange(3, device=device), torch.zeros(1, 3, dtype=torch.long, device=device)
    with torch.inference_mode():
        first = model.forward(ids, slots[None], model.allocate_cache(1, 3), slots, None)
    assert first.dtype == torch.float32
