"""Fused decode steps against `InferenceModel.forward`."""

from functools import partial

import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.inference import fused_decode
from gptforge.inference.decode_session import DecodeSession
from gptforge.inference.fused_decode import (
    FusedDecode,
    build_fused_decode,
    large_batch_decode,
    small_batch_decode,
)
from gptforge.inference.generate import TokenGenerator
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms
from gptforge.kernels.decode import DecodeInputs, TritonDecodeOps, supports_pdl
from gptforge.model import GPT
from tests.kernels.decode_reference import TorchDecodeOps

VOCAB = 50
SMALL = GPTConfig(block_size=96, vocab_size=64, n_layer=3, n_head=2, n_embd=32)
GPT2 = GPTConfig(block_size=256, vocab_size=64, n_layer=12, n_head=12, n_embd=768)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def gpt(config: GPTConfig = SMALL, *, scale: float = 3) -> GPT:
    model = GPT(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Larger than at initialization, so that the context matters.
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model.eval()


def random_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def forward_logits(
    model: InferenceModel, ids: torch.Tensor, starts: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of each step, one token at a time, by `forward` with a mask."""
    cache, slots = model.allocate_cache(*ids.shape), torch.arange(ids.size(1), device=model.device)
    logits = []
    for n in range(int(starts.max()), ids.size(1)):
        position = slots[n : n + 1]
        visible = (slots <= n) & (slots >= starts)
        mask = torch.zeros(visible.shape, dtype=model.cache_dtype, device=model.device)
        mask = mask.masked_fill(~visible, -torch.inf)[:, None, None]
        step = model.forward(ids[:, n : n + 1], position - starts, cache, position, mask)
        logits.append(step.float())
    return logits


@torch.inference_mode()
def fused_logits(
    model: InferenceModel, step: FusedDecode, ids: torch.Tensor, starts: torch.Tensor
) -> list[torch.Tensor]:
    cache, slots = model.allocate_cache(*ids.shape), torch.arange(ids.size(1), device=model.device)
    return [
        step(cache, DecodeInputs(ids[:, n : n + 1].contiguous(), starts, slots[n : n + 1]))
        for n in range(int(starts.max()), ids.size(1))
    ]


@pytest.mark.parametrize("is_small_batch", [True, False])
def test_logits_match_forward_for_any_padding(is_small_batch) -> None:
    model = InferenceModel(gpt(), vocab_size=VOCAB)
    step = partial(large_batch_decode, model)
    if is_small_batch:
        step = partial(small_batch_decode, model, TorchDecodeOps())
    ids, starts = random_ids(3, 96), torch.tensor([[0], [5], [9]])
    expected = forward_logits(model, ids, starts)
    logits = fused_logits(model, step, ids, starts)
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_only_a_step_that_matches_forward_is_used(monkeypatch) -> None:
    model = InferenceModel(gpt(), vocab_size=VOCAB)

    class Right(TorchDecodeOps):
        def __init__(self, *, pdl: bool = False) -> None:
            pass

    class Wrong(Right):
        def linear_add(self, y, linear, x) -> None:
            pass

    class Failing(Right):
        def embedding(self, inputs, wte, wpe):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(fused_decode, "supports_fused_decode", lambda cache: True)
    monkeypatch.setattr(fused_decode, "supports_pdl", lambda device: False)
    for ops, works in [(Right, True), (Wrong, False), (Failing, False)]:
        monkeypatch.setattr(fused_decode, "TritonDecodeOps", ops)
        with torch.inference_mode():
            step = build_fused_decode(model, model.allocate_cache(2, 64))
        assert (step is not None) == works
    monkeypatch.setattr(fused_decode, "supports_fused_decode", lambda cache: False)
    monkeypatch.setattr(fused_decode, "TritonDecodeOps", Right)
    assert build_fused_decode(model, model.allocate_cache(2, 64)) is None


def sampled(session: DecodeSession, fused: FusedDecode | None) -> list[list[int]]:
    with torch.inference_mode():
        session.reset(draw_uniforms([1, 2], 20))
        session.prefill([[1, 2, 3], [4]])
        for _ in range(19):
            session._static_step(fused)
    return session.read_tokens(0, 20)()[0][:, :, 0].tolist()


def test_static_steps_sample_the_same_tokens() -> None:
    model, sampling = InferenceModel(gpt(), vocab_size=VOCAB), SamplingParams(0.9, 10)

    def session() -> DecodeSession:
        return DecodeSession(
            model, batch_size=2, max_seq_length=64, max_new_tokens=20, sampling=sampling
        )

    expected = sampled(session(), None)
    assert sampled(session(), partial(small_batch_decode, model, TorchDecodeOps())) == expected
    assert sampled(session(), partial(large_batch_decode, model)) == expected
    uniforms = draw_uniforms([1, 2], 20)
    steps = list(TokenGenerator(model).generate([[1, 2, 3], [4]], uniforms, sampling))
    assert [[i for step in steps for i in step.ids[row]] for row in (0, 1)] == expected


@needs_gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("config", [SMALL, GPT2], ids=["small", "gpt2"])
def test_small_batch_logits_are_closer_to_float32_than_forward_on_a_gpu(config, rows, pdl) -> None:
    pytest.importorskip("triton")
    # Weights that bfloat16 holds exactly: what is left is the rounding of activations.
    weights = gpt(config, scale=2).bfloat16().cuda()
    model = InferenceModel(weights, vocab_size=VOCAB)
    exact = InferenceModel(weights, vocab_size=VOCAB, dtype=torch.float32)
    if pdl and not supports_pdl(model.device):
        pytest.skip("this GPU has no programmatic dependent launch")
    ids = random_ids(rows, 96).cuda()
    starts = torch.tensor([[0], [7], [3], [12]])[:rows].cuda()
    with torch.inference_mode():
        assert build_fused_decode(model, model.allocate_cache(rows, 96)) is not None
    step = partial(small_batch_decode, model, TritonDecodeOps(pdl=pdl))
    fused = torch.stack(fused_logits(model, step, ids, starts))
    plain = torch.stack(forward_logits(model, ids, starts))
    reference = torch.stack(forward_logits(exact, ids, starts))

    def error(logits: torch.Tensor) -> float:
        return float((logits - reference).norm() / reference.norm())

    assert error(fused) < 0.02
    assert error(fused) <= error(plain)


@needs_gpu
@pytest.mark.parametrize("config", [SMALL, GPT2], ids=["small", "gpt2"])
def test_large_batch_logits_are_as_close_to_float32_as_forward_on_a_gpu(config) -> None:
    pytest.importorskip("triton")
    weights = gpt(config, scale=2).bfloat16().cuda()
    model = InferenceModel(weights, vocab_size=VOCAB)
    exact = InferenceModel(weights, vocab_size=VOCAB, dtype=torch.float32)
    ids, starts = random_ids(9, 96).cuda(), torch.arange(9, device="cuda")[:, None]
    with torch.inference_mode():
        step = build_fused_decode(model, model.allocate_cache(9, 96))
    assert step is not None and step.func is large_batch_decode
    fused = torch.stack(fused_logits(model, step, ids, starts)).float()
    plain = torch.stack(forward_logits(model, ids, starts))
    reference = torch.stack(forward_logits(exact, ids, starts))
    plain_error = (plain - reference).norm()
    assert (fused - reference).norm() <= 1.2 * plain_error
    assert plain_error < 0.05 * reference.norm()


@needs_gpu
@pytest.mark.parametrize(
    ("rows", "tolerance"),
    # The residual is float32 in small batches, bfloat16 in large ones, as in forward.
    [(1, 0.05), (3, 0.05), (7, 0.3)],
)
def test_a_replayed_graph_is_greedy_by_float32_logits_on_a_gpu(rows, tolerance) -> None:
    pytest.importorskip("triton")
    weights = gpt(GPT2, scale=2).bfloat16().cuda()
    exact = InferenceModel(weights, vocab_size=VOCAB, dtype=torch.float32)
    prompts = [random_ids(1, 30)[0, 3 * row :].tolist() for row in range(rows)]
    generator = TokenGenerator(InferenceModel(weights, vocab_size=VOCAB), cuda_graph=True)
    uniforms = draw_uniforms(range(rows), 150)
    steps = list(generator.generate(prompts, uniforms, SamplingParams(0)))
    assert generator.has_cuda_graph
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            new_ids = [i for step in steps for i in step.ids[row]]
            ids = torch.tensor([prompt + new_ids], device="cuda")
            starts = torch.zeros(1, 1, dtype=torch.long, device="cuda")
            logits = torch.cat(forward_logits(exact, ids, starts))[len(prompt) - 1 : -1]
            taken = logits.gather(1, torch.tensor(new_ids, device="cuda")[:, None])[:, 0]
            # Near ties may go either way: none is further from the best than rounding explains.
            assert bool((logits.amax(1) - taken <= tolerance * logits.std(1)).all())
