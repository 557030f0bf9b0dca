"""Embeddings against double precision."""

import pytest
import torch

from gptforge.kernels.dropout import DropoutRate, keep_mask
from gptforge.kernels.embedding import embedding, embedding_backward
from tests.kernels.helpers import bf16, rel_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "length", "columns"), [(3, 7, 48), (2, 256, 384), (1, 33, 1600)])
def test_token_and_position_embeddings_are_added(device, batch, length, columns, dtype) -> None:
    torch.manual_seed(length)
    wte, wpe = torch.randn(50, columns, device=device), torch.randn(300, columns, device=device)
    idx = torch.randint(0, 50, (batch, length + 1), device=device)[:, 1:]
    exact = wte.double()[idx] + wpe.double()[:length]
    torch.testing.assert_close(embedding(idx, wte, wpe, dtype), exact.flatten(0, 1).to(dtype))


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 32), (300, 384), (33, 1600), (3, 2049)])
def test_gradients_are_added_to_the_rows_of_their_ids(device, rows, columns) -> None:
    torch.manual_seed(rows)
    dy, weight_grad = bf16(rows, columns, device=device), torch.randn(40, columns, device=device)
    # Few ids, so that many tokens share one; the last row stays untouched.
    idx = torch.randint(0, 39, (rows,), device=device)
    exact = weight_grad.double().index_add(0, idx, dy.double())
    last = weight_grad[39].clone()
    embedding_backward(dy, idx, weight_grad)
    assert rel_error(weight_grad, exact) < 1e-6
    assert torch.equal(weight_grad[39], last)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout(device, p) -> None:
    wte, wpe = torch.rand(50, 48, device=device) + 1, torch.zeros(16, 48, device=device)
    idx = torch.randint(0, 50, (3, 16), device=device)
    rate = DropoutRate(0.25, device)
    rate.set(p)
    [dropout] = rate.draw_seeds(1)
    exact = wte[idx].flatten(0, 1) * keep_mask(dropout, 48, 48) / (1 - p)
    torch.testing.assert_close(embedding(idx, wte, wpe, torch.float32, dropout), exact)
