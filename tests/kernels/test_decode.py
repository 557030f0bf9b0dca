"""Each piece of a step of writing, as a kernel, against the same in plain torch.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: Triton asks once,
when it is imported, whether to interpret.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptforge.kernels import decode
from gptforge.kernels.decode import (
    AttentionPartials,
    DecodeInputs,
    DecodeOps,
    TorchDecodeOps,
    TritonDecodeOps,
    supports_fused_decode,
)
from gptforge.kernels.packed_linear import PackedLinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [
    # B, H, D, S
    (1, 2, 64, 96),
    (3, 3, 16, 299),
    (2, 1, 80, 64),
    (4, 12, 64, 1024),
]


@pytest.fixture(params=["cpu", "cuda"])
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("runs in the child process of another test")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("there is no CUDA GPU, or Triton interprets")
    pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    if INTERPRETED and request.param[0] == 4:
        pytest.skip("takes an interpreter too long")
    torch.manual_seed(0)
    return request.param


def narrow(*shape: int, place: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(place, torch.bfloat16)


def product(outputs: int, columns: int, place: str, *, bias: bool = True) -> PackedLinear:
    weight = narrow(outputs, columns, place=place, scale=columns**-0.5)
    return PackedLinear(weight, narrow(outputs, place=place) if bias else None)


def norm(columns: int, place: str) -> tuple[torch.Tensor, torch.Tensor]:
    return narrow(columns, place=place), narrow(columns, place=place)


def stream(rows: int, columns: int, place: str) -> torch.Tensor:
    # Far from 0 on average, as streams are: a sloppy variance would show.
    return (torch.randn(rows, columns) + 3).to(place)


def written(rows: int, slot: int, place: str) -> DecodeInputs:
    starts = torch.tensor([[0], [slot], [slot // 2], [min(1, slot)]])[:rows]
    ids = torch.tensor([[1], [2], [0], [39]])[:rows]
    return DecodeInputs(ids.to(place), starts.to(place), torch.tensor([slot], device=place))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_piece_embed(place, shape) -> None:
    B, H, D, S = shape  # noqa: N806
    wte, wpe = narrow(40, H * D, place=place), narrow(S, H * D, place=place)
    at = written(B, S - 1, place)
    same(TritonDecodeOps().embedding(at, wte, wpe), TorchDecodeOps().embedding(at, wte, wpe))


def test_piece_norm_qkv_writes_its_slot_and_no_other(place, shape) -> None:
    B, H, D, S = shape  # noqa: N806
    x, weights = stream(B, H * D, place), norm(H * D, place)
    c_attn, at = product(3 * H * D, H * D, place), written(B, S // 3, place)
    memory = narrow(2, B, H, S, D, place=place)
    copy = memory.clone()
    same(
        TritonDecodeOps().layer_norm_qkv(x, weights, c_attn, memory, at),
        TorchDecodeOps().layer_norm_qkv(x, weights, c_attn, copy, at),
    )
    # Rounded to bfloat16 from sums in another order.
    torch.testing.assert_close(memory, copy, rtol=1e-2, atol=1e-4)
    others = torch.arange(S, device=place) != at.slot
    assert torch.equal(memory[..., others, :], copy[..., others, :])


@pytest.mark.parametrize("filled", [1, 3, 64, None])
def test_piece_attend_looks_from_the_start_to_the_slot(place, shape, filled) -> None:
    B, H, D, S = shape  # noqa: N806
    at = written(B, (filled or S) - 1, place)
    memory = narrow(2, B, H, S, D, place=place)
    # Whoever looks behind the slot is found out.
    memory[..., filled or S :, :] = torch.nan
    clean = memory.nan_to_num()
    q, layer = stream(B, H * D, place), product(H * D, H * D, place)
    x = stream(B, H * D, place)
    for_parts, for_torch, crossed = x.clone(), x.clone(), x.clone()
    parts = TritonDecodeOps().split_kv_attention(q, memory, at)
    plain = TorchDecodeOps().split_kv_attention(q, clean, at)
    TritonDecodeOps().combine_proj_add(parts, layer, for_parts)
    TorchDecodeOps().combine_proj_add(plain, layer, for_torch)
    TorchDecodeOps().combine_proj_add(parts, layer, crossed)
    same(for_parts, for_torch)
    same(crossed, for_torch)
    assert not torch.equal(for_parts, x)


@pytest.mark.parametrize("filled", [1, 3, 65, 2000])
def test_piece_attend_next_looks_from_the_start_to_itself(place, shape, filled) -> None:
    B, H, D, S = shape  # noqa: N806
    filled = min(filled, S)
    at = written(B, filled - 1, place)
    qkv = narrow(B, 3 * H * D, place=place)
    memory = narrow(2, B, H, S, D, place=place)
    # What is behind the slot, and in it, is not to be looked at.
    memory[..., filled - 1 :, :] = torch.nan
    wide = memory.nan_to_num().float()
    ours = decode.triton_decode_attention(qkv, memory, at.starts, at.slot)
    theirs = decode.torch_decode_attention(qkv.float(), wide, at.starts, at.slot)
    # Rounded once, on the way out.
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-3)
    filled_slots = memory[..., :filled, :]
    assert torch.equal(filled_slots.float(), wide[..., :filled, :])
    assert bool(memory[..., filled:, :].isnan().all())


@pytest.mark.parametrize("gelu", [False, True])
def test_piece_norm_product(place, shape, gelu) -> None:
    B, H, D, _ = shape  # noqa: N806
    x, weights = stream(B, H * D, place), norm(H * D, place)
    # Not a multiple of the rows that a program takes, and no bias: the output layer.
    layer = product(4 * H * D, H * D, place) if gelu else product(333, H * D, place, bias=False)
    same(
        TritonDecodeOps().layer_norm_linear(x, weights, layer, gelu=gelu),
        TorchDecodeOps().layer_norm_linear(x, weights, layer, gelu=gelu),
    )


def test_piece_norm_product_with_a_large_table(place) -> None:
    x, weights, layer = stream(2, 48, place), norm(48, place), product(16385, 48, place, bias=False)
    same(
        TritonDecodeOps().layer_norm_linear(x, weights, layer, gelu=False),
        TorchDecodeOps().layer_norm_linear(x, weights, layer, gelu=False),
    )


def test_piece_product_onto(place, shape) -> None:
    B, H, D, _ = shape  # noqa: N806
    y, x = stream(B, 4 * H * D, place), stream(B, H * D, place)
    layer, copy = product(H * D, 4 * H * D, place), x.clone()
    TritonDecodeOps().linear_add(y, layer, x)
    TorchDecodeOps().linear_add(y, layer, copy)
    same(x, copy)


def test_piece_product_onto_from_more_than_a_program_holds(place) -> None:
    y, x = stream(2, 4616, place), stream(2, 24, place)
    layer, copy = product(24, 4616, place), x.clone()
    TritonDecodeOps().linear_add(y, layer, x)
    TorchDecodeOps().linear_add(y, layer, copy)
    same(x, copy)


def test_attention_in_parts_is_that_of_the_whole() -> None:
    B, H, D, S = 2, 3, 16, 20  # noqa: N806
    way: DecodeOps = TorchDecodeOps()
    memory, q = torch.randn(2, B, H, S, D), torch.randn(B, H * D)
    at = written(B, S - 1, "cpu")
    at.starts.zero_()
    halves = []
    for part in memory.split(S // 2, 3):
        here = DecodeInputs(at.ids, at.starts, torch.tensor([S // 2 - 1]))
        halves.append(way.split_kv_attention(q, part, here))
    joined = AttentionPartials(*(torch.cat(pair, 1) for pair in zip(*halves, strict=True)))
    x, layer = torch.zeros(B, H * D), PackedLinear(torch.eye(H * D))
    way.combine_proj_add(joined, layer, x)
    expected = torch.nn.functional.scaled_dot_product_attention(q.view(B, H, 1, D), *memory)
    same(x, expected.reshape(B, -1))


def test_what_does_not_fit_is_left_to_torch() -> None:
    assert not supports_fused_decode(torch.zeros(1, 2, 1, 1, 8, 16, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_gpu_takes_small_batches_in_bfloat16() -> None:
    def cache(B: int, D: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:  # noqa: N803
        return torch.zeros(1, 2, B, 2, 8, D, dtype=dtype, device="cuda")

    assert (
        supports_fused_decode(cache(1, 64))
        and supports_fused_decode(cache(4, 16))
        and supports_fused_decode(cache(2, 128))
    )
    assert not supports_fused_decode(cache(5, 64))
    assert not supports_fused_decode(cache(1, 8)) and not supports_fused_decode(cache(1, 256))
    assert not supports_fused_decode(cache(1, 64, torch.float32))


def test_attention_of_a_next_token_is_that_of_the_whole_sequence() -> None:
    B, H, D, S = 2, 3, 16, 20  # noqa: N806
    memory = torch.zeros(2, B, H, S, D)
    qkv = torch.randn(S, B, 3 * H * D)
    starts = torch.tensor([[0], [4]])
    steps = [
        decode.torch_decode_attention(qkv[n], memory, starts, torch.tensor([n]))
        for n in range(4, S)
    ]
    q, k, v = qkv.view(S, B, 3, H, D).permute(2, 1, 3, 0, 4)
    # What was never put there is zeros.
    k, v = k.clone(), v.clone()
    k[0, :, :4] = v[0, :, :4] = 0
    for row, start in enumerate([0, 4]):
        whole = torch.nn.functional.scaled_dot_product_attention(
            q[row, :, start:], k[row, :, start:], v[row, :, start:], is_causal=True
        )  # (H, S - start, D)
        ours = torch.stack([step[row] for step in steps])  # (S - 4, C)
        same(ours.view(-1, H, D), whole[:, 4 - start :].transpose(0, 1))


@pytest.mark.skipif(INTERPRETED, reason="is the child process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_compute_the_same_when_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "piece and cpu", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
