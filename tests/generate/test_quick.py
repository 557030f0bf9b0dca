"""The step for a captured graph against the engine's own."""

import pytest
import torch

from gptforge.config import GPTConfig
from gptforge.inference import fused_decode
from gptforge.inference.decode_session import DecodeSession
from gptforge.inference.fused_decode import (
    FusedDecode,
    LargeBatchDecode,
    SmallBatchDecode,
    build_fused_decode,
)
from gptforge.inference.generate import TokenGenerator
from gptforge.inference.model import InferenceModel
from gptforge.inference.sampling import SamplingParams, draw_uniforms
from gptforge.kernels.decode import TritonDecodeOps, supports_pdl
from gptforge.model import GPT
from tests.kernels.decode_reference import TorchDecodeOps

SIZE = 50
SHAPE = GPTConfig(block_size=96, vocab_size=64, n_layer=3, n_head=2, n_embd=32)
WIDE = GPTConfig(block_size=256, vocab_size=64, n_layer=12, n_head=12, n_embd=768)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


def model(shape: GPTConfig = SHAPE, *, scale: float = 3) -> GPT:
    made = GPT(shape).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Larger than they are drawn, so that what came before matters.
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made.eval()


def random_ids(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, SIZE, (rows, columns), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def of_the_engine(
    engine: InferenceModel, ids: torch.Tensor, starts: torch.Tensor
) -> list[torch.Tensor]:
    """Logits of each step, one token a step, by `Engine.forward` with a mask."""
    cache, everything = (
        engine.allocate_cache(*ids.shape),
        torch.arange(ids.size(1), device=engine.device),
    )
    logits = []
    for n in range(int(starts.max()), ids.size(1)):
        slot = torch.tensor([n], device=engine.device)
        seen = (everything <= n) & (everything >= starts)
        mask = torch.zeros(seen.shape, dtype=engine.cache_dtype, device=engine.device)
        mask = mask.masked_fill(~seen, -torch.inf)[:, None, None]
        one = engine.forward(ids[:, n : n + 1], slot - starts, cache, slot, mask)
        logits.append(one.float())
    return logits


@torch.inference_mode()
def of_the_quick(
    engine: InferenceModel, step: FusedDecode, ids: torch.Tensor, starts: torch.Tensor
) -> list[torch.Tensor]:
    cache = engine.allocate_cache(*ids.shape)
    places = torch.arange(ids.size(1), device=engine.device)
    return [
        step(ids[:, n : n + 1].contiguous(), starts, cache, places[n : n + 1])
        for n in range(int(starts.max()), ids.size(1))
    ]


@pytest.mark.parametrize("few", [True, False])
def test_step_by_step_the_logits_are_the_engines_whatever_the_starts(few) -> None:
    engine = InferenceModel(model(), vocab_size=SIZE)
    step = SmallBatchDecode(engine, TorchDecodeOps()) if few else LargeBatchDecode(engine)
    ids, starts = random_ids(3, 96), torch.tensor([[0], [5], [9]])
    theirs = of_the_engine(engine, ids, starts)
    ours = of_the_quick(engine, step, ids, starts)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)


def test_only_what_agrees_with_the_engine_is_taken(monkeypatch) -> None:
    engine = InferenceModel(model(), vocab_size=SIZE)

    class Right(TorchDecodeOps):
        def __init__(self, *, early: bool = False) -> None:
            pass

    class Wrong(Right):
        def linear_add(self, y, linear, x) -> None:
            pass

    class Failing(Right):
        def embedding(self, inputs, wte, wpe):
            raise RuntimeError("no compiler")

    monkeypatch.setattr(fused_decode, "fits", lambda cache: True)
    monkeypatch.setattr(fused_decode, "comes_early", lambda device: False)
    for way, works in [(Right, True), (Wrong, False), (Failing, False)]:
        monkeypatch.setattr(fused_decode, "ByTriton", way)
        cache = engine.allocate_cache(2, 64)
        with torch.inference_mode():
            assert (build_fused_decode(engine, cache) is not None) == works
    monkeypatch.setattr(fused_decode, "fits", lambda cache: False)
    monkeypatch.setattr(fused_decode, "ByTriton", Right)
    assert build_fused_decode(engine, engine.allocate_cache(2, 64)) is None


def sampled(session: DecodeSession, quick: FusedDecode | None) -> list[list[int]]:
    with torch.inference_mode():
        session.reset(draw_uniforms([1, 2], 20))
        session.prefill([[1, 2, 3], [4]])
        for _ in range(19):
            session._captured_step(quick)
    return session.read_tokens(0, 20)[0][:, :, 0].tolist()


def test_a_captured_step_is_the_same_either_way() -> None:
    engine = InferenceModel(model(), vocab_size=SIZE)
    how = {"batch": 2, "slots": 64, "steps": 20, "sampling": SamplingParams(0.9, 10)}
    plain = sampled(DecodeSession(engine, **how), None)
    assert (
        sampled(DecodeSession(engine, **how), SmallBatchDecode(engine, TorchDecodeOps())) == plain
    )
    assert sampled(DecodeSession(engine, **how), LargeBatchDecode(engine)) == plain
    dice = draw_uniforms([1, 2], 20)
    steps = list(TokenGenerator(engine).generate([[1, 2, 3], [4]], dice, how["sampling"]))
    assert [[i for step in steps for i in step.ids[row]] for row in (0, 1)] == plain


@on_a_gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["small", "gpt2"])
def test_on_a_gpu_the_logits_are_nearer_to_the_exact_ones_than_the_engines(
    shape, rows, early
) -> None:
    pytest.importorskip("triton")
    # Weights that bfloat16 holds exactly: what is left is the rounding on the way.
    ours = model(shape, scale=2).bfloat16().cuda()
    narrow = InferenceModel(ours, vocab_size=SIZE)
    exact = InferenceModel(ours, vocab_size=SIZE, dtype=torch.float32)
    if early and not supports_pdl(narrow.device):
        pytest.skip("this GPU starts kernels one after the other")
    way = TritonDecodeOps(pdl=early)
    ids = random_ids(rows, 96).cuda()
    starts = torch.tensor([[0], [7], [3], [12]])[:rows].cuda()
    assert build_fused_decode(narrow, narrow.allocate_cache(rows, 96)) is not None
    quick_ones = torch.stack(of_the_quick(narrow, SmallBatchDecode(narrow, way), ids, starts))
    plain_ones = torch.stack(of_the_engine(narrow, ids, starts))
    reference = torch.stack(of_the_engine(exact, ids, starts))

    def far(logits: torch.Tensor) -> float:
        return float((logits - reference).norm() / reference.norm())

    assert far(quick_ones) < 0.02
    assert far(quick_ones) <= far(plain_ones)


@on_a_gpu
@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["small", "gpt2"])
def test_on_a_gpu_many_sequences_come_as_near_to_the_exact_logits_as_the_engine(shape) -> None:
    pytest.importorskip("triton")
    ours = model(shape, scale=2).bfloat16().cuda()
    narrow = InferenceModel(ours, vocab_size=SIZE)
    exact = InferenceModel(ours, vocab_size=SIZE, dtype=torch.float32)
    ids, starts = random_ids(9, 96).cuda(), torch.arange(9, device="cuda")[:, None]
    assert isinstance(build_fused_decode(narrow, narrow.allocate_cache(9, 96)), LargeBatchDecode)
    quick_ones = torch.stack(of_the_quick(narrow, LargeBatchDecode(narrow), ids, starts)).float()
    plain_ones = torch.stack(of_the_engine(narrow, ids, starts))
    reference = torch.stack(of_the_engine(exact, ids, starts))
    plain = (plain_ones - reference).norm()
    assert (quick_ones - reference).norm() <= 1.2 * plain
    assert plain < 0.05 * reference.norm()


@on_a_gpu
@pytest.mark.parametrize(
    ("rows", "near"),
    # The stream of few sequences is float32; that of many is bfloat16, as the engine's.
    [(1, 0.05), (3, 0.05), (7, 0.3)],
)
def test_on_a_gpu_a_replayed_graph_takes_what_is_likeliest_by_exact_logits(rows, near) -> None:
    pytest.importorskip("triton")
    ours = model(WIDE, scale=2).bfloat16().cuda()
    engine = InferenceModel(ours, vocab_size=SIZE)
    exact = InferenceModel(ours, vocab_size=SIZE, dtype=torch.float32)
    prompts = [random_ids(1, 30)[0, 3 * row :].tolist() for row in range(rows)]
    decoder = TokenGenerator(engine, cuda_graph=True)
    dice = draw_uniforms(range(rows), 150)
    steps = list(decoder.generate(prompts, dice, SamplingParams(0)))
    assert decoder.has_cuda_graph
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            chosen = [i for step in steps for i in step.ids[row]]
            everything = torch.tensor([prompt + chosen], device="cuda")
            starts = torch.zeros(1, 1, dtype=torch.long, device="cuda")
            logits = torch.cat(of_the_engine(exact, everything, starts))[len(prompt) - 1 : -1]
            taken = logits.gather(1, torch.tensor(chosen, device="cuda")[:, None])[:, 0]
            # Near ties may fall either way: none is further from the best than rounding explains.
            assert bool((logits.amax(1) - taken <= near * logits.std(1)).all())
