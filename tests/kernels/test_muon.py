"""Muon's fused passes against torch's operations in double precision."""

import pytest
import torch

from gptforge.kernels import muon
from gptforge.kernels.muon import apply_update, update_momentum
from tests.kernels.helpers import rel_error

SHAPES = [(3, 5), (64, 192), (130, 70)]


def tensors(device: torch.device, seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng).to(device) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_momentum_is_nesterovs_and_stays_if_a_step_is_skipped(device, dtype, found) -> None:
    buffers, grads = tensors(device, 0), tensors(device, 1)
    before = [buffer.clone() for buffer in buffers]
    if found:
        grads[0][0, 0] = torch.nan
    found_inf = None if found is None else torch.tensor(found, device=device)
    out = [torch.empty_like(buffer, dtype=dtype) for buffer in buffers]
    update_momentum(grads, buffers, out, momentum=0.95, found_inf=found_inf)
    for buffer, old, grad, result in zip(buffers, before, grads, out, strict=True):
        if found:
            assert torch.equal(buffer, old)
            assert bool(result.isfinite().all())
            continue
        expected = 0.95 * old.double() + 0.05 * grad.double()
        assert rel_error(buffer, expected) < 1e-6
        nesterov = 0.95 * expected + 0.05 * grad.double()
        # The interpreter truncates to bfloat16.
        assert rel_error(result, nesterov) < (1e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize("on_device", [False, True])
def test_weights_decay_and_move_unless_a_step_is_skipped(device, dtype, found, on_device) -> None:
    params, updates = tensors(device, 0), [update.to(dtype) for update in tensors(device, 1)]
    before = [param.clone() for param in params]
    found_inf = None if found is None else torch.tensor(found, device=device)
    lr = torch.tensor(0.02, device=device) if on_device else 0.02
    apply_update(params, updates, lr=lr, weight_decay=0.5, scale=3.0, found_inf=found_inf)
    for param, old, update in zip(params, before, updates, strict=True):
        expected = old.double() * (1 - 0.02 * 0.5) - 0.02 * 3 * update.double()
        if found:
            assert torch.equal(param, old)
        else:
            assert rel_error(param, expected) < 1e-6


def test_without_triton_torch_updates_the_weights(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(muon, "uses_triton", lambda _: True)
    monkeypatch.setattr(muon, "_apply_update", fail)
    muon.can_launch.cache_clear()
    param, update = torch.ones(2, 2), torch.ones(2, 2)
    apply_update([param], [update], lr=0.5, weight_decay=0.0, scale=1.0, found_inf=None)
    muon.can_launch.cache_clear()
    assert torch.equal(param, torch.full((2, 2), 0.5))
