"""Each kernel of a decode step against plain torch; on a CPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.decode import (
    AttentionPartials,
    DecodeInputs,
    TritonDecodeOps,
    decode_attention,
    supports_fused_decode,
)
from gptforge.kernels.packed_linear import PackedLinear
from tests.kernels.decode_reference import TorchDecodeOps
from tests.kernels.helpers import INTERPRETED, bf16

# B, H, D, S
SHAPES = [(1, 2, 64, 96), (3, 3, 16, 299), (2, 1, 80, 64), (4, 12, 64, 1024)]


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or Triton's interpreter")
    return device


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    if INTERPRETED and request.param[0] == 4:
        pytest.skip("slow when interpreted")
    torch.manual_seed(0)
    return request.param


def random_linear(
    outputs: int, columns: int, device: torch.device, *, bias: bool = True
) -> PackedLinear:
    weight = bf16(outputs, columns, device=device, scale=columns**-0.5)
    return PackedLinear(weight, bf16(outputs, device=device) if bias else None)


def random_norm(columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return bf16(columns, device=device), bf16(columns, device=device)


def random_residual(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    # Far from 0 on average, as residuals are: an inaccurate variance would show.
    return (torch.randn(rows, columns) + 3).to(device)


def decode_inputs(rows: int, slot: int, device: torch.device) -> DecodeInputs:
    starts = torch.tensor([[0], [slot], [slot // 2], [min(1, slot)]])[:rows]
    ids = torch.tensor([[1], [2], [0], [39]])[:rows]
    return DecodeInputs(ids.to(device), starts.to(device), torch.tensor([slot], device=device))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_embedding(triton_device, shape) -> None:
    B, H, D, S = shape  # noqa: N806
    wte, wpe = bf16(40, H * D, device=triton_device), bf16(S, H * D, device=triton_device)
    inputs = decode_inputs(B, S - 1, triton_device)
    assert_close(
        TritonDecodeOps().embedding(inputs, wte, wpe), TorchDecodeOps().embedding(inputs, wte, wpe)
    )


def test_layer_norm_qkv_writes_one_slot(triton_device, shape) -> None:
    B, H, D, S = shape  # noqa: N806
    x, norm = random_residual(B, H * D, triton_device), random_norm(H * D, triton_device)
    c_attn = random_linear(3 * H * D, H * D, triton_device)
    inputs = decode_inputs(B, S // 3, triton_device)
    cache = bf16(2, B, H, S, D, device=triton_device)
    copy = cache.clone()
    assert_close(
        TritonDecodeOps().layer_norm_qkv(x, norm, c_attn, cache, inputs),
        TorchDecodeOps().layer_norm_qkv(x, norm, c_attn, copy, inputs),
    )
    # Rounded to bfloat16 from sums in another order.
    torch.testing.assert_close(cache, copy, rtol=1e-2, atol=1e-4)
    others = torch.arange(S, device=triton_device) != inputs.slot
    assert torch.equal(cache[..., others, :], copy[..., others, :])


@pytest.mark.parametrize("filled", [1, 3, 64, None])
def test_split_kv_attention_reads_from_start_to_slot(triton_device, shape, filled) -> None:
    B, H, D, S = shape  # noqa: N806
    inputs = decode_inputs(B, (filled or S) - 1, triton_device)
    cache = bf16(2, B, H, S, D, device=triton_device)
    # Reading past the slot would give NaN.
    cache[..., filled or S :, :] = torch.nan
    q, linear = random_residual(B, H * D, triton_device), random_linear(H * D, H * D, triton_device)
    x = random_residual(B, H * D, triton_device)
    triton_x, torch_x, mixed_x = x.clone(), x.clone(), x.clone()
    triton_ops, torch_ops = TritonDecodeOps(), TorchDecodeOps()
    partials = triton_ops.split_kv_attention(q, cache, inputs)
    triton_ops.combine_proj_add(partials, linear, triton_x)
    expected = torch_ops.split_kv_attention(q, cache.nan_to_num(), inputs)
    torch_ops.combine_proj_add(expected, linear, torch_x)
    torch_ops.combine_proj_add(partials, linear, mixed_x)
    assert_close(triton_x, torch_x)
    assert_close(mixed_x, torch_x)
    assert not torch.equal(triton_x, x)


@pytest.mark.parametrize("filled", [1, 3, 65, 2000])
def test_decode_attention_reads_from_start_to_itself(triton_device, shape, filled) -> None:
    B, H, D, S = shape  # noqa: N806
    filled = min(filled, S)
    inputs = decode_inputs(B, filled - 1, triton_device)
    qkv = bf16(B, 3 * H * D, device=triton_device)
    cache = bf16(2, B, H, S, D, device=triton_device)
    # Neither the slot's old content nor what follows is to be read.
    cache[..., filled - 1 :, :] = torch.nan
    keys, values = cache.nan_to_num().float()
    q, k, v = qkv.float().view(B, 3, H, 1, D).unbind(1)
    keys[:, :, filled - 1 : filled], values[:, :, filled - 1 : filled] = k, v
    slots = torch.arange(S, device=triton_device)
    mask = (slots >= inputs.starts) & (slots < filled)
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None, None])
    out = decode_attention(qkv, cache, inputs.starts, inputs.slot)
    torch.testing.assert_close(out.float(), expected.flatten(1), rtol=1e-2, atol=1e-3)
    assert torch.equal(cache[..., :filled, :].float(), torch.stack([keys, values])[..., :filled, :])
    assert bool(cache[..., filled:, :].isnan().all())


@pytest.mark.parametrize("gelu", [False, True])
def test_layer_norm_linear(triton_device, shape, gelu) -> None:
    B, H, D, _ = shape  # noqa: N806
    x, norm = random_residual(B, H * D, triton_device), random_norm(H * D, triton_device)
    # The output layer has no bias; 333 is not a multiple of a program's rows.
    linear = random_linear(4 * H * D if gelu else 333, H * D, triton_device, bias=gelu)
    assert_close(
        TritonDecodeOps().layer_norm_linear(x, norm, linear, gelu=gelu),
        TorchDecodeOps().layer_norm_linear(x, norm, linear, gelu=gelu),
    )


def test_layer_norm_linear_with_a_large_vocabulary(triton_device) -> None:
    x, norm = random_residual(1, 48, triton_device), random_norm(48, triton_device)
    linear = random_linear(16385, 48, triton_device, bias=False)
    assert_close(
        TritonDecodeOps().layer_norm_linear(x, norm, linear, gelu=False),
        TorchDecodeOps().layer_norm_linear(x, norm, linear, gelu=False),
    )


# The first has more columns than a program holds.
@pytest.mark.parametrize(
    ("B", "columns", "outputs"), [(2, 4616, 24), (1, 512, 128), (3, 192, 48), (4, 768, 192)]
)
def test_linear_add(triton_device, B, columns, outputs) -> None:  # noqa: N803
    torch.manual_seed(0)
    y, x = random_residual(B, columns, triton_device), random_residual(B, outputs, triton_device)
    linear, copy = random_linear(outputs, columns, triton_device), x.clone()
    TritonDecodeOps().linear_add(y, linear, x)
    TorchDecodeOps().linear_add(y, linear, copy)
    assert_close(x, copy)


def test_partials_of_two_halves_combine_to_full_attention() -> None:
    B, H, D, S = 2, 3, 16, 20  # noqa: N806
    ops = TorchDecodeOps()
    cache, q = torch.randn(2, B, H, S, D), torch.randn(B, H * D)
    inputs = decode_inputs(B, S - 1, torch.device("cpu"))
    inputs.starts.zero_()
    at_half = DecodeInputs(inputs.ids, inputs.starts, torch.tensor([S // 2 - 1]))
    halves = [ops.split_kv_attention(q, half, at_half) for half in cache.split(S // 2, 3)]
    partials = AttentionPartials(*(torch.cat(pair, 1) for pair in zip(*halves, strict=True)))
    x = torch.zeros(B, H * D)
    ops.combine_proj_add(partials, PackedLinear(torch.eye(H * D)), x)
    expected = F.scaled_dot_product_attention(q.view(B, H, 1, D), *cache)
    assert_close(x, expected.reshape(B, -1))


def test_decode_attention_step_by_step_matches_the_full_sequence() -> None:
    B, H, D, S = 2, 3, 16, 20  # noqa: N806
    cache = torch.zeros(2, B, H, S, D)
    qkv = torch.randn(S, B, 3 * H * D)
    starts = torch.tensor([[0], [4]])
    steps = [decode_attention(qkv[n], cache, starts, torch.tensor([n])) for n in range(4, S)]
    q, k, v = qkv.view(S, B, 3, H, D).permute(2, 1, 3, 0, 4)
    # The first four slots were never written.
    k, v = k.clone(), v.clone()
    k[0, :, :4] = v[0, :, :4] = 0
    for row, start in enumerate([0, 4]):
        full = F.scaled_dot_product_attention(
            q[row, :, start:], k[row, :, start:], v[row, :, start:], is_causal=True
        )  # (H, S - start, D)
        out = torch.stack([step[row] for step in steps])  # (S - 4, C)
        assert_close(out.view(-1, H, D), full[:, 4 - start :].transpose(0, 1))


def test_fused_decode_needs_a_gpu() -> None:
    assert not supports_fused_decode(torch.zeros(1, 2, 1, 1, 8, 16, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_fused_decode_takes_small_batches_in_bfloat16() -> None:
    def cache(B: int, D: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:  # noqa: N803
        return torch.zeros(1, 2, B, 2, 8, D, dtype=dtype, device="cuda")

    for supported in (cache(1, 64), cache(4, 16), cache(2, 128)):
        assert supports_fused_decode(supported)
    for unsupported in (cache(5, 64), cache(1, 8), cache(1, 256), cache(1, 64, torch.float32)):
        assert not supports_fused_decode(unsupported)
