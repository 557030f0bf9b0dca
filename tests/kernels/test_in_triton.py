"""The kernels in Triton without a GPU, by its interpreter: the same as the plain torch beside them.

    TRITON_INTERPRET=1 pytest tests/kernels

On a GPU the other tests here run them.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import gelu, launch, layer_norm
from gptforge.kernels.dropout import DropoutSeed, draw_dropout_seeds

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs where Triton interprets"
)
SHAPES = [(1, 8), (5, 32), (100, 48), (9, 1600), (3, 2049)]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch) -> None:
    monkeypatch.setattr(layer_norm, "num_sms", lambda device: 3)


def drops() -> list[DropoutSeed | None]:
    return [None, *draw_dropout_seeds(1, 0.3, torch.device("cpu"))]


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_layer_norm_both_ways(rows, columns, has_branch) -> None:
    torch.manual_seed(rows)
    stream, branch, upstream, beside = (torch.randn(rows, columns) for _ in range(4))
    weight, bias = torch.randn(columns), torch.randn(columns)
    for drop in drops():
        given = [branch.clone() if has_branch else None for _ in range(2)]
        out, norm = layer_norm.add_layer_norm(stream.clone(), given[0], weight, bias, drop)
        ours, our_norm = layer_norm._add_layer_norm_cuda(
            stream.clone(), given[1], weight, bias, drop
        )
        torch.testing.assert_close((ours, our_norm.residual), (out, norm.residual))
        for more in (beside, None):
            sums, our_sums = torch.zeros(2, 3 * columns)
            both = layer_norm.layer_norm_backward(upstream.clone(), norm, weight, more, sums)
            ours = layer_norm._layer_norm_backward_cuda(
                upstream.clone(), our_norm, weight, more, our_sums, None
            )
            torch.testing.assert_close((*ours, our_sums), (*both, sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_way_back_through_a_gelu(rows, columns, again) -> None:
    torch.manual_seed(rows)
    x, upstream = torch.randn(rows, columns), torch.randn(rows, columns)
    sums, our_sums = torch.zeros(2, columns)
    both = gelu.gelu_backward(x.clone(), upstream.clone(), sums, recompute=again)
    ours = gelu._gelu_backward_cuda(x.clone(), upstream.clone(), our_sums, None, again)
    torch.testing.assert_close((*ours, our_sums), (*both, sums), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rows_added_to_a_table(rows, columns) -> None:
    from gptforge.kernels import in_triton

    x, idx, table = (
        torch.randn(rows, columns),
        torch.randint(0, 4, (rows,)),
        torch.zeros(5, columns),
    )
    wide, height = launch.tile_shape(columns, numel=2048)
    in_triton.add_rows[(math.ceil(rows / height),)](
        x, idx, table, rows, columns=columns, BLOCK=wide, ROWS=height
    )
    torch.testing.assert_close(table, torch.zeros(5, columns).index_add(0, idx, x))


@pytest.mark.parametrize("columns", [2, 7, 8, 65, 128, 4096, 4097, 5000])
def test_the_loss_and_its_gradient(columns) -> None:
    from gptforge.kernels import in_triton_head

    torch.manual_seed(columns)
    logits, targets = torch.randn(5, columns) * 4, torch.randint(0, columns, (5,))
    targets[2] = -1
    exact = logits.clone().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    (expected.sum() * 0.25).backward()
    losses, wide = torch.empty(5), min(4096, max(8, 1 << (columns - 1).bit_length()))
    in_triton_head.cross_entropy[(2,)](
        logits, targets, losses, logits.stride(0), -1, torch.tensor(0.25), 5, 2,
        columns=columns, BLOCK=wide,
    )  # fmt: skip
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, exact.grad, rtol=1e-4, atol=1e-6)
