import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from gptforge.config import GPTConfig
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.model import GPT
from tests.conftest import TINY


def copy_weights(model: GPT, reference) -> None:
    """Copy a model of transformers, whose projections are Conv1D: the transposed matrix."""
    tensors = reference.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            transpose = any(layer in name for layer in ("c_attn.w", "c_proj.w", "c_fc.w"))
            parameter.copy_(tensors[name].T if transpose else tensors[name])


@pytest.mark.parametrize("n_layer", [1, 3])
def test_logits_and_loss_match_transformers(device, n_layer) -> None:
    transformers = pytest.importorskip("transformers")
    shape = GPTConfig(block_size=64, vocab_size=320, n_layer=n_layer, n_head=4, n_embd=64)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.block_size,
            n_embd=shape.n_embd,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            attn_implementation="eager",
        )
    )
    torch.manual_seed(3)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = GPT(shape)
    copy_weights(model, reference)
    model, reference = model.to(device).eval(), reference.to(device).eval()
    idx = torch.randint(0, shape.vocab_size, (3, 64), device=device)
    with torch.no_grad():
        logits, expected = model(idx), reference(idx).logits
        loss = model(idx[:, :-1], idx[:, 1:]) / (3 * 63)
        expected_loss = reference(idx, labels=idx).loss
    # Logits reach about 50 here, so this asks for five decimals in float32.
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=atol)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)


def test_initial_logits_match_transformers_to_1e_5() -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2)).eval()
    shape = GPTConfig(block_size=1024, vocab_size=50257, n_layer=2, n_head=12, n_embd=768)
    model = GPT(shape).eval()
    copy_weights(model, reference)
    with torch.no_grad():
        idx = torch.randint(0, 50257, (1, 128), generator=torch.Generator().manual_seed(1))
        assert (model(idx) - reference(idx).logits).abs().max() < 1e-5


def test_attention_is_causal(tiny_model, device) -> None:
    model = tiny_model.to(device).eval()
    idx = torch.arange(12, device=device)[None]
    changed = idx.clone()
    changed[0, 7:] = 50
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_loss_sums_over_tokens_and_ignores_ignore_index(tiny_model) -> None:
    idx = torch.randint(0, 64, (2, 9))
    targets = idx[:, 1:].clone()
    targets[0, 3:] = IGNORE_INDEX
    logits = tiny_model(idx[:, :-1]).log_softmax(-1)
    expected = -sum(
        logits[b, t, targets[b, t]]
        for b in range(2)
        for t in range(8)
        if targets[b, t] != IGNORE_INDEX
    )
    torch.testing.assert_close(tiny_model(idx[:, :-1], targets), expected)


def test_init_weights_has_gpt2s_distribution() -> None:
    shape = GPTConfig(block_size=128, vocab_size=512, n_layer=8, n_head=4, n_embd=128)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.1 * expected, name
    assert model.lm_head.weight is model.transformer["wte"].weight


def test_initial_loss_is_log_vocab_size(tiny_model) -> None:
    idx = torch.randint(0, 64, (8, 17))
    loss = tiny_model(idx[:, :-1], idx[:, 1:]) / (8 * 16)
    assert loss.item() == pytest.approx(math.log(64), rel=0.02)


def test_dropout_only_in_training_mode() -> None:
    model = GPT(dataclasses.replace(TINY, dropout=0.5)).init_weights()
    idx = torch.arange(10)[None]
    assert not torch.allclose(model.train()(idx), model(idx))
    torch.testing.assert_close(model.eval()(idx), model(idx))
    assert {type(m) for m in model.modules()}.isdisjoint({torch.nn.Dropout})


def test_mlp_ratio_sets_the_hidden_width() -> None:
    model = GPT(dataclasses.replace(TINY, mlp_ratio=3))
    assert model.transformer["h"][0].mlp.c_fc.weight.shape == (48, 16)


def test_attention_matches_the_textbook_formula(tiny_model) -> None:
    attention = tiny_model.transformer["h"][0].attn
    x = torch.randn(2, 5, 16)
    q, k, v = attention.c_attn(x).split(16, dim=-1)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(F.softmax(scores, -1) @ v[..., part])
    torch.testing.assert_close(attention(x), attention.c_proj(torch.cat(heads, -1)))


def test_construction_draws_no_weights_and_init_weights_is_reproducible() -> None:
    shape = GPTConfig(block_size=8, vocab_size=20, n_layer=2, n_head=2, n_embd=8)
    rng_state = torch.get_rng_state()
    models = [GPT(shape).init_weights(torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), rng_state)
    for (name, value), other in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert torch.equal(value, other), name
    assert models[0].lm_head.weight is models[0].transformer["wte"].weight
