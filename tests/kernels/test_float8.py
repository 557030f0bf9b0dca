"""Casts to fp8 and matmuls of fp8 tensors, against double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.device import has_float8
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.float8 import (
    E4M3,
    E5M2,
    Float8Tensor,
    cast_transpose,
    empty_float8,
    gelu_backward_cast_transpose,
    transpose,
)
from gptforge.kernels.float8_matmul import accumulate_float8_wgrad, float8_dgrad, float8_linear
from gptforge.kernels.layer_norm import add_layer_norm
from gptforge.kernels.reductions import PendingReductions
from tests.kernels.helpers import INTERPRETED, bf16, rel_error

SHAPES = [(1, 16), (130, 96), (100, 37), (64, 384)]
# Triton's interpreter rounds wrongly to fp8: there the kernels write bfloat16 instead.
DTYPES = [torch.bfloat16] if INTERPRETED else [E4M3, E5M2]
MAX_ERROR = {torch.bfloat16: 5e-3, E4M3: 0.04, E5M2: 0.08}
needs_fp8 = pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds wrongly")


@pytest.fixture
def device(device: torch.device) -> torch.device:
    if device.type == "cuda" and not has_float8(device):
        pytest.skip("this GPU has no fp8")
    return device


def scalar(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, device=device)


def exact(x: Float8Tensor) -> Tensor:
    return x.data.double() * x.scale_inv.double()


def assert_transposed(x: Float8Tensor) -> None:
    assert x.transpose.is_contiguous()
    assert torch.equal(x.transpose.float(), x.data.float().t())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_cast_writes_both_layouts(device, rows, columns, source, dtype, gelu) -> None:
    torch.manual_seed(rows)
    x = bf16(rows, columns, device=device, scale=3).to(source)
    out = empty_float8(x, dtype, scalar(0.1, device))
    assert cast_transpose(x, out, gelu=gelu) is out
    expected = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    assert rel_error(exact(out), expected) < MAX_ERROR[dtype]
    assert_transposed(out)


@needs_fp8
@pytest.mark.parametrize(("dtype", "limit"), [(E4M3, 448.0), (E5M2, 57344.0)], ids=str)
def test_large_values_saturate_and_nan_stays(device, dtype, limit) -> None:
    x = torch.tensor([[1e9, -1e9, torch.inf, torch.nan, 0.0, limit, 1e-9, 1.0]], device=device)
    out = cast_transpose(x, empty_float8(x, dtype, scalar(1.0, device)))
    expected = torch.tensor([[limit, -limit, limit, torch.nan, 0.0, limit, 0.0, 1.0]])
    torch.testing.assert_close(out.data.float().cpu(), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_transpose_copies_the_bits(device, rows, columns) -> None:
    bits = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device=device)
    x = bits.view(E4M3)
    assert torch.equal(transpose(x).view(torch.uint8), bits.t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gelu_backward_matches_autograd(device, rows, columns, dtype) -> None:
    torch.manual_seed(rows)
    x, dy = (bf16(rows, columns, device=device, scale=2) for _ in range(2))
    pre_act = x.double().requires_grad_()
    F.gelu(pre_act, approximate="tanh").backward(dy.double())
    out = empty_float8(x, dtype, scalar(0.1, device))
    bias_grad, pending = torch.ones(columns, device=device), PendingReductions()
    gelu_backward_cast_transpose(x, dy, out, bias_grad, pending)
    pending.flush()
    assert rel_error(exact(out), pre_act.grad) < MAX_ERROR[dtype]
    assert_transposed(out)
    # The sum is over gradients before they are rounded.
    assert rel_error(bias_grad - 1, pre_act.grad.sum(0)) < 1e-4


@needs_fp8
def test_layer_norm_and_cross_entropy_write_fp8(device) -> None:
    torch.manual_seed(0)
    residual, weight = bf16(70, 384, device=device), torch.randn(384, device=device)
    plain, _ = add_layer_norm(residual, None, weight, weight)
    rounded, saved = add_layer_norm(residual, None, weight, weight, out_dtype=E4M3)
    assert rounded.dtype == E4M3 and saved.residual is residual
    assert rel_error(rounded, plain) < MAX_ERROR[E4M3]
    logits, targets = bf16(70, 384, device=device), torch.randint(384, (70,), device=device)
    targets[:5] = -1
    before, out = logits.clone(), torch.empty_like(logits, dtype=E5M2)
    losses = cross_entropy_in_place(logits, targets, 1024.0, out)
    assert torch.equal(logits, before), "the logits are kept"
    assert torch.equal(cross_entropy_in_place(logits, targets, 1024.0), losses)
    assert rel_error(out, logits) < MAX_ERROR[E5M2]


# Tokens, in, out; the last ones are not multiples of 16, which no fp8 kernel takes.
@needs_fp8
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(256, 64, 192), (1024, 768, 256), (100, 37, 91)]
)
def test_matmuls_of_a_layer(device, rows, inputs, outputs) -> None:
    torch.manual_seed(rows)

    def quantized(*shape: int, scale: float, dtype: torch.dtype = E4M3) -> Float8Tensor:
        x = torch.randn(shape).to(device)
        return cast_transpose(x * scale, empty_float8(x, dtype, scalar(scale, device)))

    x, weight = quantized(rows, inputs, scale=1.0), quantized(outputs, inputs, scale=2e-2)
    dy, bias = quantized(rows, outputs, scale=1e-6, dtype=E5M2), bf16(outputs, device=device)
    y = exact(x) @ exact(weight).t() + bias.double()
    assert rel_error(float8_linear(x.data, weight, bias), y) < 1e-2
    assert rel_error(float8_linear(x.data, weight), y - bias.double()) < 1e-2
    dx = exact(dy) @ exact(weight)
    assert rel_error(float8_dgrad(dy, weight), dx) < 1e-2
    out = torch.empty_like(dx, dtype=torch.bfloat16)
    assert float8_dgrad(dy, weight, out=out) is out and rel_error(out, dx) < 1e-2
    weight_grad = torch.randn(outputs, inputs, device=device) * 1e-4
    expected = weight_grad.double() + 2 * exact(dy).t() @ exact(x)
    for _ in range(2):
        accumulate_float8_wgrad(weight_grad, dy, x.transpose)
    assert rel_error(weight_grad, expected) < 1e-3
