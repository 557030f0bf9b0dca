import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gptforge.builders import memory_fit
from gptforge.builders.memory_fit import out_of_memory_hint
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.training import train_step
from gptforge.training.dry_run import dry_run, fits_memory, time_optimizer
from gptforge.training.train_step import TrainStep
from tests.training.steps import BFLOAT16, make_batch, make_step

MANUAL = KernelConfig(manual_backward=True)
FUSED = KernelConfig(fused_cross_entropy=True, residual_dtype=torch.bfloat16)


def test_micro_batch_size_does_not_change_the_step(tiny_model, device) -> None:
    results = []
    for size in (8, 4, 1, 3):
        step = make_step(tiny_model.to(device), batch_size=size)
        for _ in range(3):
            loss, norm = step(*make_batch(device), lr=1e-2)
        results.append((loss, norm, step.model.transformer["wte"].weight.detach()))
    for loss, norm, weight in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, results[0][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight, results[0][2], rtol=1e-3, atol=1e-4)


def test_step_matches_a_plain_torch_loop(tiny_model, device) -> None:
    plain = copy.deepcopy(tiny_model).to(device)
    step = make_step(tiny_model.to(device), batch_size=2, grad_clip=0.5)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    inputs, targets = make_batch(device)
    for _ in range(4):
        loss, norm = step(inputs, targets, lr=1e-2)
        optimizer.zero_grad()
        expected = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-3, atol=1e-5)
    assert norm > 0.5, "the norm is the one before clipping"


def test_grad_clip_zero_disables_clipping(tiny_model) -> None:
    off, huge = (make_step(tiny_model, grad_clip=clip) for clip in (0.0, 1e9))
    for step in (off, huge):
        step(*make_batch("cpu"), lr=1e-2)
    for left, right in zip(off.model.parameters(), huge.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_bfloat16_stays_close_and_keeps_fp32_weights(tiny_model, device) -> None:
    exact = make_step(tiny_model.to(device))
    bf16 = make_step(tiny_model.to(device), precision=BFLOAT16)
    for _ in range(5):
        loss, _ = exact(*make_batch(device), lr=1e-2)
        bf16_loss, _ = bf16(*make_batch(device), lr=1e-2)
    torch.testing.assert_close(bf16_loss, loss, rtol=0.03, atol=0.03)
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in bf16.optimizer.state.values()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_float16_scaler_state_is_restored(tiny_model) -> None:
    step, other = (
        make_step(tiny_model.to("cuda"), precision=Precision(torch.float16, "test"))
        for _ in range(2)
    )
    for _ in range(3):
        loss, _ = step(*make_batch("cuda"), lr=1e-2)
    assert loss.isfinite()
    state = step.scaler_state_dict()
    assert state["scale"] > 1
    other.load_scaler_state_dict(state)
    assert other.scaler_state_dict() == state


def limit_memory(step: TrainStep, max_sequences: int) -> TrainStep:
    """Raise an out-of-memory error for larger micro-batches."""
    forward_backward = step.backend.forward_backward

    def limited(x, y, scale):
        if len(x) > max_sequences:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward_backward(x, y, scale)

    step.backend.forward_backward = limited
    return step


def test_out_of_memory_halves_the_micro_batch(tiny_model, messages) -> None:
    roomy = make_step(tiny_model)
    small = limit_memory(make_step(tiny_model, halve_on_oom=True), 3)
    for _ in range(3):
        expected = roomy(*make_batch("cpu"), lr=1e-2)
        torch.testing.assert_close(small(*make_batch("cpu"), lr=1e-2), expected)
    assert small.micro_batch_size == 2
    assert [line.split()[-1] for line in messages] == ["4", "2"]
    for left, right in zip(roomy.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    assert not fits_memory(small, 4, 16)
    assert fits_memory(small, 3, 16)


def test_out_of_memory_for_the_optimizer_state_halves_it_too(tiny_model, monkeypatch) -> None:
    roomy, small = make_step(tiny_model), make_step(tiny_model, halve_on_oom=True)
    init_state = small.optimizer.init_state

    def limited() -> None:
        if small.micro_batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        init_state()

    monkeypatch.setattr(small.optimizer, "init_state", limited)
    expected = roomy(*make_batch("cpu"), lr=1e-2)
    torch.testing.assert_close(small(*make_batch("cpu"), lr=1e-2), expected)
    assert small.micro_batch_size == 4


def test_explicit_micro_batch_size_is_not_halved(tiny_model) -> None:
    small = limit_memory(make_step(tiny_model), 3)
    with pytest.raises(torch.OutOfMemoryError):
        small(*make_batch("cpu"), lr=1e-2)
    assert small.micro_batch_size == 8


@pytest.mark.parametrize(("limit", "words"), [(3, "--batch_size 3 --gradient_accumulation_steps 4"),
                                              (0, "nor does less")])  # fmt: skip
def test_out_of_memory_hint(tiny_model, monkeypatch, limit, words) -> None:
    step = make_step(tiny_model, batch_size=6)
    monkeypatch.setattr(memory_fit, "fits_memory", lambda step, size, length: size <= limit)
    config = dataclasses.replace(Config(), batch_size=6, gradient_accumulation_steps=2)
    assert words in out_of_memory_hint(step, config)
    assert "--batch_size 6 does not fit" in out_of_memory_hint(step, config)


def test_dry_run_leaves_no_trace(tiny_model) -> None:
    step = make_step(tiny_model)
    before = copy.deepcopy(step.model.state_dict())
    rng_state = torch.get_rng_state()
    assert dry_run(step, 2, 16) > 0
    assert torch.equal(rng_state, torch.get_rng_state())
    assert all(p.grad is None for p in step.model.parameters())
    assert not step.optimizer.state
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_timing_the_optimizer_leaves_no_trace(tiny_model, optimizer) -> None:
    plain, timed = (make_step(tiny_model, optimizer=optimizer, ema=0.9) for _ in range(2))
    for _ in range(3):
        assert time_optimizer(timed) > 0
        for step in (plain, timed):
            step(*make_batch("cpu"), lr=1e-2)
    for name, tensor in timed.model.state_dict().items():
        assert torch.equal(tensor, plain.model.state_dict()[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling takes long on a CPU")
def test_compiled_step_matches_the_plain_one(tiny_model) -> None:
    plain, compiled = make_step(tiny_model.to("cuda")), make_step(tiny_model.to("cuda"))
    compiled.compile()
    for _ in range(5):
        expected, _ = plain(*make_batch("cuda"), lr=1e-2)
        loss, _ = compiled(*make_batch("cuda"), lr=1e-2)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["manual", "cuda graph", "fused loss", "compiled"])
def test_fast_bfloat16_steps_match_the_plain_one(tiny_model, device, variant) -> None:
    if device.type == "cpu" and variant in ("cuda graph", "compiled"):
        pytest.skip("for GPUs")
    plain = make_step(tiny_model.to(device))
    fast = make_step(
        tiny_model.to(device),
        precision=BFLOAT16,
        kernels=MANUAL if variant in ("manual", "cuda graph") else FUSED,
        batch_size=4,
    )
    if variant == "cuda graph":
        assert fast.capture_cuda_graph(16)
    if variant == "compiled":
        fast.compile()
    for _ in range(20):
        expected, _ = plain(*make_batch(device), lr=1e-2)
        loss, _ = fast(*make_batch(device), lr=1e-2)
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert {p.dtype for p in fast.model.parameters()} == {torch.float32}


def test_without_memory_for_cuda_graphs_the_manual_backend_stays(tiny_model, monkeypatch) -> None:
    plain, full = (make_step(tiny_model, kernels=MANUAL) for _ in range(2))
    monkeypatch.setattr(train_step, "fits_memory", lambda *_: False)
    assert not full.capture_cuda_graph(16)
    assert full.backend_name == "manual backward"
    for _ in range(2):
        loss, expected = (step(*make_batch("cpu"), lr=1e-2)[0] for step in (full, plain))
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("manual_backward", [True, False])
@pytest.mark.parametrize("option", [{"activation_checkpointing": True}, {"loss_chunk": 7}])
def test_saving_memory_does_not_change_the_loss(tiny_model, option, manual_backward) -> None:
    kernels = KernelConfig(manual_backward=manual_backward)
    plain = make_step(tiny_model, kernels=kernels)
    saving = make_step(tiny_model, kernels=kernels, **option)
    for _ in range(3):
        expected = plain(*make_batch("cpu"), lr=1e-2)
        torch.testing.assert_close(saving(*make_batch("cpu"), lr=1e-2), expected)


def test_activation_checkpointing_recomputes_the_same_dropout(tiny_model) -> None:
    model = GPT(dataclasses.replace(tiny_model.config, dropout=0.3)).init_weights()
    losses = []
    for recompute in (False, True):
        torch.manual_seed(5)
        step = make_step(model, activation_checkpointing=recompute)
        losses.append([step(*make_batch("cpu"), lr=1e-2)[0] for _ in range(3)])
    torch.testing.assert_close(losses[0], losses[1])
