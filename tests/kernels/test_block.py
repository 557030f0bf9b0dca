"""The pieces of a block against autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.attention import pack_qkv
from gptforge.kernels.dropout import draw_dropout_seeds, keep_mask
from gptforge.kernels.embedding import embedding, embedding_backward
from gptforge.kernels.gelu import gelu, gelu_backward
from gptforge.kernels.layer_norm import add_layer_norm, layer_norm_backward
from tests.kernels.near import distance

SHAPES = [(5, 32), (64, 48), (1000, 384), (70, 768), (33, 1600)]


def narrow(*shape: int, place: str) -> torch.Tensor:
    return torch.randn(*shape, device=place).bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "length", "columns"), [(3, 7, 48), (2, 256, 384), (1, 33, 1600)])
def test_embed_adds_up_rows_of_both_tables(place, count, length, columns, dtype) -> None:
    torch.manual_seed(length)
    wte, wpe = torch.randn(50, columns, device=place), torch.randn(300, columns, device=place)
    idx = torch.randint(0, 50, (count, length + 1), device=place)[:, 1:]
    exact = wte.double()[idx] + wpe.double()[:length]
    torch.testing.assert_close(embedding(idx, wte, wpe, dtype), exact.flatten(0, 1).to(dtype))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rows_are_added_where_their_ids_say(place, rows, columns) -> None:
    torch.manual_seed(rows)
    x, table = narrow(rows, columns, place=place), torch.randn(40, columns, device=place)
    # Few ids, so that many rows meet, and one that stays as it is.
    idx = torch.randint(0, 39, (rows,), device=place)
    exact = table.double().index_add(0, idx, x.double())
    last = table[39].clone()
    embedding_backward(x, idx, table)
    assert distance(table, exact) < 1e-6
    assert torch.equal(table[39], last)


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_add_norm_is_the_sum_and_its_layer_norm(place, rows, columns, has_branch) -> None:
    torch.manual_seed(rows)
    stream = narrow(rows, columns, place=place)
    branch = narrow(rows, columns, place=place) if has_branch else None
    weight, bias = (torch.randn(columns, device=place) for _ in range(2))
    total = stream.double() if branch is None else stream.double() + branch.double()
    out, norm = add_layer_norm(stream, branch, weight, bias)
    expected = F.layer_norm(total, (columns,), weight.double(), bias.double())
    assert distance(out, expected) < 1e-2
    assert distance(norm.residual, total) < 5e-3
    assert out.dtype == norm.residual.dtype == torch.bfloat16
    assert norm.residual is (stream if branch is None else branch)


@pytest.mark.parametrize("has_beside", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_norm_backward_is_the_gradient_and_adds_the_vectors(
    place, rows, columns, has_beside
) -> None:
    torch.manual_seed(rows)
    stream, upstream, beside = (narrow(rows, columns, place=place) for _ in range(3))
    weight, bias = (torch.randn(columns, device=place) for _ in range(2))
    _, norm = add_layer_norm(stream, None, weight, bias)
    exact = [x.double().requires_grad_() for x in (stream, weight, bias)]
    F.layer_norm(exact[0], (columns,), *exact[1:]).backward(upstream.double())
    to_stream = exact[0].grad + beside.double() if has_beside else exact[0].grad

    before = torch.randn(3 * columns, device=place)
    sums = before.clone()
    out, to_branch = layer_norm_backward(
        upstream, norm, weight, beside if has_beside else None, sums
    )
    grown = (sums - before).split(columns)
    assert out is upstream and to_branch is upstream
    assert distance(out, to_stream) < 1e-2
    assert distance(grown[0], exact[1].grad) < 1e-3
    assert distance(grown[1], exact[2].grad) < 1e-3
    assert distance(grown[2], out.double().sum(0)) < 1e-3
    # Room for two sums only: there is no bias in front.
    fewer = torch.zeros(2 * columns, device=place)
    layer_norm_backward(narrow(rows, columns, place=place), norm, weight, None, fewer)
    assert fewer.all()


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_what_is_dropped_from_a_branch_is_dropped_from_its_gradient(
    place, rows, columns, has_branch
) -> None:
    torch.manual_seed(rows)
    stream, upstream, beside = (narrow(rows, columns, place=place) for _ in range(3))
    branch = narrow(rows, columns, place=place) if has_branch else None
    weight, bias = (torch.randn(columns, device=place) for _ in range(2))
    [drop] = draw_dropout_seeds(1, 0.25, torch.device(place))
    mask = keep_mask(drop, rows, columns)
    total = stream.double()
    if branch is not None:
        total += branch.double() * mask / 0.75
    _, norm = add_layer_norm(stream, branch, weight, bias, drop)
    assert distance(norm.residual, total) < 5e-3

    sums = torch.zeros(3 * columns, device=place)
    undropped = layer_norm_backward(
        upstream.clone(), norm._replace(drop=None), weight, beside, sums
    )[0]
    sums.zero_()
    out, to_branch = layer_norm_backward(upstream, norm, weight, beside, sums)
    torch.testing.assert_close(out, undropped)
    torch.testing.assert_close(to_branch, (out.float() * mask / 0.75).bfloat16())
    assert distance(sums[2 * columns :], to_branch.double().sum(0)) < 1e-3


def test_an_embedding_is_dropped_from(place) -> None:
    wte, wpe = torch.rand(50, 48, device=place) + 1, torch.zeros(16, 48, device=place)
    idx = torch.randint(0, 50, (3, 16), device=place)
    [drop] = draw_dropout_seeds(1, 0.5, torch.device(place))
    exact = wte[idx].flatten(0, 1) * keep_mask(drop, 48, 48) * 2
    torch.testing.assert_close(embedding(idx, wte, wpe, torch.float32, drop), exact)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_gelu_and_its_way_back(place, rows, columns) -> None:
    torch.manual_seed(rows)
    x, upstream = (narrow(rows, columns, place=place) * 2 for _ in range(2))
    exact = x.double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    expected.backward(upstream.double())
    assert distance(gelu(x), expected.detach()) < 5e-3
    sums = torch.ones(columns, device=place)
    slope, same = gelu_backward(x, upstream.clone(), sums.clone(), recompute=False)
    assert same is x and torch.equal(x.double(), exact)
    gradient, again = gelu_backward(x, upstream, sums, recompute=True)
    assert gradient is upstream and again is x
    assert distance(again, expected.detach()) < 5e-3
    assert distance(gradient, exact.grad) < 1e-2
    assert torch.equal(slope, gradient)
    assert distance(sums - 1, gradient.double().sum(0)) < 1e-3


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_pack_puts_three_side_by_side_and_adds_them_up(place, rows, columns) -> None:
    parts = [narrow(rows, columns, place=place) for _ in range(3)]
    sums = torch.ones(3 * columns, device=place)
    out = pack_qkv(*parts, sums)
    assert torch.equal(out, torch.cat(parts, 1))
    assert distance(sums - 1, out.double().sum(0)) < 1e-3


def test_numbers_far_out_stay_finite(place) -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=place).bfloat16()
    torch.testing.assert_close(gelu(x), x.clamp(min=0))
    gradient, _ = gelu_backward(
        x, torch.ones_like(x), torch.zeros(5, device=place), recompute=False
    )
    torch.testing.assert_close(gradient.float(), torch.tensor([[0, 0, 0.5, 1, 1]], device=place))
