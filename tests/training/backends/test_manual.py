"""The manual backward against autograd, in float64 where the device allows it."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.config import GPTConfig
from gptforge.kernels.attention import TritonAttention, select_attention
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.kernels.dropout import DropoutRate, apply_dropout, keep_mask
from gptforge.model import GPT
from gptforge.training.backends import manual
from gptforge.training.backends.cuda_graph import CudaGraphBackend
from gptforge.training.backends.manual import ManualBackend

SHAPE = GPTConfig(
    block_size=24, vocab_size=71, n_layer=3, n_head=4, n_embd=32, mlp_ratio=4, dropout=0.0
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture(autouse=True)
def _triton(device) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")


def model_and_batch(device: torch.device) -> tuple[GPT, Tensor, Tensor]:
    torch.manual_seed(3)
    model = GPT(SHAPE).init_weights()
    for parameter in model.parameters():
        # Away from the zeros and ones that biases and norms start with.
        parameter.data += 0.05 * torch.randn_like(parameter)
    idx, targets = torch.randint(0, 71, (2, 6, 16))
    targets[0, :5] = IGNORE_INDEX
    return model.to(device), idx.to(device), targets.to(device)


def started(backend: ManualBackend) -> ManualBackend:
    backend.zero_grad()
    return backend


def max_grad_error(model: GPT, reference: GPT) -> tuple[float, str]:
    """The largest relative error among the parameters' gradients, and where it is."""
    return max(
        (float((p.grad.double() - q.grad).norm() / q.grad.norm()), name)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
    )


@pytest.mark.parametrize("option", [{}, {"activation_checkpointing": True}, {"loss_chunk": 10}])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_gradients_match_autograd_and_accumulate(dtype, rtol, option, device) -> None:
    model, idx, targets = model_and_batch(device)
    reference = copy.deepcopy(model).double()
    expected = reference(idx, targets)
    (expected * 0.25).backward()
    if dtype == torch.float64:
        if device.type == "cuda":
            pytest.skip("the kernels sum in float32")
        model = model.double()
    backend = started(ManualBackend(model, dtype, **option))
    loss = backend.forward_backward(idx[:2], targets[:2], 0.25)
    loss = loss + backend.forward_backward(idx[2:], targets[2:], 0.25)
    # The reference, too, computes the loss from float32 logits.
    torch.testing.assert_close(loss.double(), expected.detach().double(), rtol=rtol, atol=0)
    error, name = max_grad_error(model, reference)
    uses_tf32 = device.type == "cuda" and dtype == torch.float32
    assert error < (1e-2 if uses_tf32 else rtol), name


def test_both_embedding_gradients_agree(device, monkeypatch) -> None:
    model, idx, targets = model_and_batch(device)
    grads = []
    for max_one_hot in (0, 71):
        monkeypatch.setattr(manual, "MAX_ONE_HOT_VOCAB", max_one_hot)
        backend = started(ManualBackend(copy.deepcopy(model), torch.float32))
        backend.forward_backward(idx, targets, 1.0)
        grads.append(backend.model.transformer["wte"].weight.grad)
    rtol = 1e-2 if device.type == "cuda" else 1e-5  # TF32
    assert (grads[0] - grads[1]).norm() < rtol * grads[0].norm()


def test_zero_grad_refreshes_the_weights(device) -> None:
    model, idx, targets = model_and_batch(device)
    backend = started(ManualBackend(model, torch.bfloat16))
    backend.forward_backward(idx, targets, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    backend.zero_grad()
    loss = backend.forward_backward(idx, targets, 1.0)
    grads = [p.grad.clone() for p in model.parameters()]
    fresh = started(ManualBackend(model, torch.bfloat16))
    torch.testing.assert_close(fresh.forward_backward(idx, targets, 1.0), loss)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("uses_triton", [False, True], ids=["sdpa", "triton"])
def test_backward_drops_what_the_forward_dropped(uses_triton, device, monkeypatch) -> None:
    """Autograd with the same masks. SDPA draws its own masks, so there attention drops nothing."""
    shape, dtype = dataclasses.replace(SHAPE, dropout=0.25), torch.float32
    if uses_triton:
        shape, dtype = dataclasses.replace(shape, n_embd=128), torch.bfloat16
        attention = select_attention(device, dtype, head_size=32)
        if not isinstance(attention, TritonAttention):
            pytest.skip("there is no Triton attention for this device")
    _, idx, targets = model_and_batch(device)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(0)).to(device).train()
    torch.manual_seed(5)
    seeds = iter(DropoutRate(0.25, device).draw_seeds(1 + 3 * SHAPE.n_layer))

    def dropout(x: Tensor, *_: object) -> Tensor:
        return apply_dropout(next(seeds), x.flatten(0, 1)).view_as(x)

    def causal_attention(q: Tensor, k: Tensor, v: Tensor, _: float) -> Tensor:
        B, H, T, D = q.shape  # noqa: N806
        mask = keep_mask(seed := next(seeds), B * H * T, T).view(B, H, T, T) * seed.scale
        if not uses_triton:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        future = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        probs = (q @ k.mT * D**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        return (probs * mask) @ v

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr("gptforge.model.causal_attention", causal_attention)
    reference = copy.deepcopy(model)
    expected = reference(idx, targets)
    expected.backward()
    assert next(seeds, None) is None
    monkeypatch.setattr(
        "gptforge.kernels.attention.causal_attention",
        lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    torch.manual_seed(5)
    loss = started(ManualBackend(model, dtype)).forward_backward(idx, targets, 1.0)
    rtol = 3e-2 if uses_triton else 1e-2 if device.type == "cuda" else 1e-5  # TF32
    torch.testing.assert_close(loss, expected.detach(), rtol=rtol, atol=0)
    error, name = max_grad_error(model, reference)
    assert error < 2 * rtol, name


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_may_change(p, device) -> None:
    _, idx, targets = model_and_batch(device)
    weights = GPT(SHAPE).init_weights().state_dict()
    losses = []
    for initial in (0.25, p):
        model = GPT(dataclasses.replace(SHAPE, dropout=initial)).to(device).train()
        model.load_state_dict(weights)
        backend = started(ManualBackend(model, torch.float32))
        backend.set_dropout(p)
        torch.manual_seed(5)
        loss = backend.forward_backward(idx, targets, 1.0)
        model.set_dropout(p)
        losses.append(torch.stack([loss, model(idx, targets)]))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("max_norm", [1e-3, 1e3, float("inf")])
def test_clip_grad_norm_matches_torch(max_norm) -> None:
    model, idx, targets = model_and_batch(torch.device("cpu"))
    reference = copy.deepcopy(model)
    backend = started(ManualBackend(model, torch.float32))
    backend.forward_backward(idx, targets, 1.0)
    reference(idx, targets).backward()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    torch.testing.assert_close(backend.clip_grad_norm_(max_norm), expected)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_cuda_graph_matches_the_captured_backend() -> None:
    device = torch.device("cuda")
    model, idx, targets = model_and_batch(device)
    backend = started(ManualBackend(model, torch.bfloat16))
    batches = [(idx, targets), (targets.clamp(0), idx)]
    expected = [backend.forward_backward(*batch, 0.5) for batch in batches]
    grads = backend.grads.flat.clone()
    graph = CudaGraphBackend(backend)
    for _ in range(3):
        graph.zero_grad()
        losses = [graph.forward_backward(*batch, 0.5) for batch in batches]
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(backend.grads.flat, grads, rtol=1e-3, atol=1e-4)


@needs_cuda
def test_cuda_graph_draws_new_dropout_masks_from_the_rng_state() -> None:
    device = torch.device("cuda")
    # Heads of 32 channels, for which Triton's attention is used.
    shape = dataclasses.replace(SHAPE, n_embd=128, dropout=0.25)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(0)).to(device)
    idx, targets = torch.randint(0, 71, (2, 6, 16), device=device)
    graph = CudaGraphBackend(ManualBackend(model, torch.bfloat16))

    def losses() -> list[float]:
        torch.manual_seed(11)
        found = []
        for _ in range(4):
            graph.zero_grad()
            found.append(float(graph.forward_backward(idx, targets, 1.0)))
        return found

    losses()  # the first call warms up, the second one is captured
    first = losses()
    assert len(set(first)) == 4
    assert losses() == first
    if isinstance(select_attention(device, torch.bfloat16, head_size=32), TritonAttention):
        graph.set_dropout(0.0)  # SDPA would keep the dropout of the capture
        without = losses()
        torch.testing.assert_close(without[0], float(model.eval()(idx, targets)), rtol=1e-2, atol=0)
        assert len(set(without)) == 1
