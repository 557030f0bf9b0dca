"""The manual backward with matmuls in fp8, beside bfloat16."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from gptforge.device import Precision, has_float8
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.training.backends.cuda_graph import CudaGraphBackend
from gptforge.training.backends.float8 import Float8Backend
from gptforge.training.backends.manual import ManualBackend
from gptforge.training.distillation import Distillation
from tests.training.backends.test_manual import SHAPE, model_and_batch, started
from tests.training.steps import make_batch, make_step

FP8 = Precision(torch.bfloat16, "test", float8=True)


@pytest.fixture(autouse=True)
def _fp8(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
        if not has_float8(device):
            pytest.skip("this GPU has no fp8")


def train(backend: ManualBackend, batch: tuple[Tensor, Tensor], scale: float | Tensor) -> Tensor:
    """The gradients of a batch."""
    started(backend).forward_backward(*batch, scale)
    return backend.grads.flat.clone()


def rel_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("option", [{}, {"activation_checkpointing": True}, {"loss_chunk": 16}])
@pytest.mark.parametrize("scale", [0.25, 1e-6])
def test_gradients_are_those_of_bfloat16_but_for_rounding(option, scale, device) -> None:
    model, *batch = model_and_batch(device)
    expected = train(ManualBackend(model, torch.bfloat16), batch, scale)
    found = train(Float8Backend(model, torch.bfloat16, **option), batch, scale)
    assert rel_error(found, expected) < 0.1
    loss = started(ManualBackend(model, torch.bfloat16)).forward_backward(*batch, scale)
    rounded = started(Float8Backend(model, torch.bfloat16)).forward_backward(*batch, scale)
    torch.testing.assert_close(rounded, loss, rtol=2e-3, atol=0)


def test_gradients_accumulate_over_micro_batches(device) -> None:
    model, idx, targets = model_and_batch(device)
    backend = Float8Backend(model, torch.bfloat16)
    full = train(backend, (idx, targets), 0.25)
    started(backend)
    for part in (slice(2), slice(2, 6)):
        backend.forward_backward(idx[part], targets[part], torch.tensor(0.25, device=device))
    assert rel_error(backend.grads.flat, full) < 1e-2


def test_no_scale_depends_on_earlier_steps(device) -> None:
    """So a resumed run is exact, with nothing to save."""
    model, *batch = model_and_batch(device)
    used = Float8Backend(model, torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    train(used, batch, 10.0)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    # The embedding's gradient is summed by atomics on a GPU.
    rtol = 1e-5 if device.type == "cuda" else 0
    fresh = train(Float8Backend(model, torch.bfloat16), batch, 0.25)
    torch.testing.assert_close(train(used, batch, 0.25), fresh, rtol=rtol, atol=rtol)


def test_weights_of_zero_are_kept(device) -> None:
    model, *batch = model_and_batch(device)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_proj.weight").zero_()
    assert train(Float8Backend(model, torch.bfloat16), batch, 1.0).isfinite().all()


def test_nan_in_a_weight_reaches_loss_and_gradients(device) -> None:
    model, *batch = model_and_batch(device)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight")[0, 0] = torch.nan
    backend = started(Float8Backend(model, torch.bfloat16))
    assert backend.forward_backward(*batch, 1.0).isnan()
    assert backend.grads.flat.norm().isnan()


def test_dropout_and_teachers(device) -> None:
    _, idx, targets = model_and_batch(device)
    shape = dataclasses.replace(SHAPE, dropout=0.25)
    model, teacher = (
        GPT(s).init_weights(torch.Generator().manual_seed(i)).to(device)
        for i, s in enumerate((shape, SHAPE))
    )
    grads = []
    for kind in (ManualBackend, Float8Backend):
        torch.manual_seed(5)
        distillation = Distillation([teacher], 0.5)
        backend = kind(copy.deepcopy(model), torch.bfloat16, distillation=distillation)
        grads.append(train(backend, (idx, targets), 1.0))
    # On a CPU torch's attention draws its own masks from the same state.
    assert rel_error(grads[1], grads[0]) < 0.2


def test_learns_like_bfloat16(tiny_model: GPT, device) -> None:
    losses = {}
    for precision in (Precision(torch.bfloat16, "test"), FP8):
        step = make_step(
            tiny_model.to(device),
            precision=precision,
            kernels=KernelConfig(manual_backward=True, float8=precision.float8),
        )
        values = [float(step(*make_batch(device), lr=1e-2)[0]) for _ in range(25)]
        losses[step.backend_name] = values
    plain, fp8 = losses["manual backward"], losses["manual backward, fp8"]
    assert plain[0] - plain[-1] > 0.5
    assert abs(fp8[-1] - plain[-1]) < 0.1 * (plain[0] - plain[-1])


def test_cuda_graph_matches_the_captured_backend(device) -> None:
    if device.type != "cuda":
        pytest.skip("only CUDA has graphs")
    model, *batch = model_and_batch(device)
    backend = Float8Backend(model, torch.bfloat16)
    expected = train(backend, batch, 0.5)
    graph = CudaGraphBackend(backend)
    for scale in (0.1, 0.3, 0.5):
        graph.zero_grad()
        graph.forward_backward(*batch, scale)
    assert rel_error(backend.grads.flat, expected) < 1e-3
