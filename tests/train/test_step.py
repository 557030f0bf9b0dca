import copy
import dataclasses

import pytest
import torch

from gptforge.builders.memory_fit import out_of_memory_hint
from gptforge.config import Config
from gptforge.device import Precision
from gptforge.errors import RunError
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.train.micro_batch import find_micro_batch
from gptforge.train.savings import DEFAULT_SAVINGS, Savings
from gptforge.train.train_step import TrainStep

FLOAT32 = Precision(torch.float32, "")


def make(
    model: GPT,
    *,
    micro_batch: int = 8,
    precision=FLOAT32,
    clip: float = 1.0,
    kernels=DEFAULT_KERNELS,
    savings=DEFAULT_SAVINGS,
    optimizer="adamw",
) -> TrainStep:
    return TrainStep(
        model,
        build_optimizer(optimizer, model, betas=(0.9, 0.95), weight_decay=0.1),
        precision=precision,
        micro_batch_size=micro_batch,
        grad_clip=clip,
        kernels=kernels,
        savings=savings,
    )


def batch(device, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (rows, 17), generator=dice).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def test_how_a_global_batch_is_split_changes_nothing(tiny_model, device) -> None:
    results = []
    for micro_batch in (8, 4, 1, 3):
        step = make(copy.deepcopy(tiny_model).to(device), micro_batch=micro_batch)
        for _ in range(3):
            loss, norm = step(*batch(device), lr=1e-2)
        results.append((loss, norm, step.model.transformer["wte"].weight.detach()))
    for loss, norm, weight in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, results[0][1], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight, results[0][2], rtol=1e-3, atol=1e-4)


def test_an_update_is_that_of_a_plain_loop(tiny_model, device) -> None:
    model, plain = copy.deepcopy(tiny_model).to(device), copy.deepcopy(tiny_model).to(device)
    step = make(model, micro_batch=2, clip=0.5)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in plain.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in plain.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    inputs, targets = batch(device)
    for _ in range(4):
        loss, norm = step(inputs, targets, lr=1e-2)
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-3, atol=1e-5)
    assert norm > 0.5, "the norm is the one before clipping"


def test_no_clipping_is_no_clipping(tiny_model) -> None:
    loose = make(copy.deepcopy(tiny_model), clip=0.0)
    wide = make(copy.deepcopy(tiny_model), clip=1e9)
    for step in (loose, wide):
        step(*batch("cpu"), lr=1e-2)
    for left, right in zip(loose.model.parameters(), wide.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_bfloat16_stays_close_and_keeps_float32_weights(tiny_model, device) -> None:
    exact = make(copy.deepcopy(tiny_model).to(device))
    mixed = make(copy.deepcopy(tiny_model).to(device), precision=Precision(torch.bfloat16, "test"))
    for _ in range(5):
        loss, _ = exact(*batch(device), lr=1e-2)
        mixed_loss, _ = mixed(*batch(device), lr=1e-2)
    torch.testing.assert_close(mixed_loss, loss, rtol=0.03, atol=0.03)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    moments = [s["exp_avg"].dtype for s in mixed.optimizer.state.values()]
    assert set(moments) == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_float16_scales_its_loss_and_its_state_travels(tiny_model) -> None:
    step = make(tiny_model.to("cuda"), precision=Precision(torch.float16, "test"))
    for _ in range(3):
        loss, _ = step(*batch("cuda"), lr=1e-2)
    assert loss.isfinite()
    state = step.scaler_state_dict()
    assert state["scale"] > 1
    other = make(GPT(tiny_model.config).to("cuda"), precision=Precision(torch.float16, "test"))
    other.load_scaler_state_dict(state)
    assert other.scaler_state_dict() == state


class SmallMemory(TrainStep):
    """A device on which more than three windows at once do not fit."""

    def _forward_backward(self, x, y, scale):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._forward_backward(x, y, scale)


def test_when_memory_runs_out_the_same_batch_is_learned_in_smaller_parts(tiny_model) -> None:
    roomy, small = make(copy.deepcopy(tiny_model)), make(copy.deepcopy(tiny_model))
    said: list[str] = []
    small.__class__, small._halve_on_oom, small._log = SmallMemory, True, said.append
    for _ in range(3):
        expected = roomy(*batch("cpu"), lr=1e-2)
        torch.testing.assert_close(small(*batch("cpu"), lr=1e-2), expected)
    assert small.micro_batch_size == 2
    assert [line.split()[-1] for line in said] == ["4", "2"]
    for left, right in zip(roomy.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    assert not small.fits(4, 16)
    assert small.fits(3, 16)


def test_when_memory_runs_out_for_the_optimizer_micro_batches_shrink_too(
    tiny_model, monkeypatch
) -> None:
    roomy, small = make(copy.deepcopy(tiny_model)), make(copy.deepcopy(tiny_model))
    small._halve_on_oom = True
    prepare = small.optimizer.init_state

    def short_of_memory() -> None:
        if small.micro_batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        prepare()

    monkeypatch.setattr(small.optimizer, "init_state", short_of_memory)
    expected = roomy(*batch("cpu"), lr=1e-2)
    torch.testing.assert_close(small(*batch("cpu"), lr=1e-2), expected)
    assert small.micro_batch_size == 4


def test_a_batch_size_given_by_hand_is_not_changed_behind_ones_back(tiny_model) -> None:
    small = make(tiny_model)
    small.__class__ = SmallMemory
    with pytest.raises(torch.OutOfMemoryError):
        small(*batch("cpu"), lr=1e-2)
    assert small.micro_batch_size == 8


@pytest.mark.parametrize(("limit", "words"), [(3, "--batch_size 3 --gradient_accumulation_steps 4"),
                                              (0, "nor does less")])  # fmt: skip
def test_the_error_says_what_would_fit_and_learn_the_same(tiny_model, limit, words) -> None:
    step = make(tiny_model, micro_batch=6)
    step.fits = lambda windows, _: windows <= limit
    config = dataclasses.replace(Config(), batch_size=6, gradient_accumulation_steps=2)
    assert words in out_of_memory_hint(step, config)
    assert "--batch_size 6 does not fit" in out_of_memory_hint(step, config)


def find(tmp_path, limit: int, *, free: int = 10**12, most: int = 32, tried=None) -> int:
    def fits(windows: int) -> bool:
        if tried is not None:
            tried.append(windows)
        return windows <= limit

    return find_micro_batch(
        most, estimate=lambda n: n * 10**9, free_memory=free, fits=fits,
        cache_path=tmp_path / "cache" / "answers.json", key=f"{free}",
    )  # fmt: skip


def test_the_largest_micro_batch_that_fits_is_found_and_remembered(tmp_path) -> None:
    first: list[int] = []
    assert find(tmp_path, 9, tried=first) == 8
    assert first == [32, 16, 8]
    again: list[int] = []
    assert find(tmp_path, 9, tried=again) == 8
    assert again == [8]
    # The estimate spares trials that cannot go well.
    estimated: list[int] = []
    assert find(tmp_path, 32, free=10 * 10**9, tried=estimated) == 8
    assert estimated == [8]
    (tmp_path / "cache" / "answers.json").write_text("[broken")
    assert find(tmp_path, 9) == 8


def test_a_memory_that_holds_nothing_is_said_so(tmp_path) -> None:
    with pytest.raises(RunError, match="not even one window"):
        find(tmp_path, 0)


def test_a_rehearsal_leaves_no_trace(tiny_model) -> None:
    step = make(tiny_model)
    before = copy.deepcopy(tiny_model.state_dict())
    dice = torch.get_rng_state()
    assert step.dry_run(2, 16) > 0
    assert torch.equal(dice, torch.get_rng_state())
    assert all(p.grad is None for p in tiny_model.parameters())
    assert not step.optimizer.state
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiling takes long on a CPU")
def test_compiled_steps_learn_the_same(tiny_model) -> None:
    plain, compiled = make(copy.deepcopy(tiny_model).to("cuda")), make(tiny_model.to("cuda"))
    compiled.compile()
    for _ in range(5):
        expected, _ = plain(*batch("cuda"), lr=1e-2)
        loss, _ = compiled(*batch("cuda"), lr=1e-2)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["written out", "recorded", "fused head", "compiled"])
def test_the_fast_paths_learn_what_the_plain_one_learns(tiny_model, device, way) -> None:
    if device.type == "cpu" and way in ("recorded", "compiled"):
        pytest.skip("for GPUs")
    kernels = KernelConfig(manual_backward=True)
    if way in ("fused head", "compiled"):
        kernels = KernelConfig(fused_cross_entropy=True, residual_dtype=torch.bfloat16)
    plain = make(copy.deepcopy(tiny_model).to(device))
    precision = Precision(torch.bfloat16, "test")
    fast = make(tiny_model.to(device), precision=precision, kernels=kernels, micro_batch=4)
    if way == "recorded":
        assert fast.capture_cuda_graph(16)
    if way == "compiled":
        fast.compile()
    for _ in range(20):
        expected, _ = plain(*batch(device), lr=1e-2)
        loss, _ = fast(*batch(device), lr=1e-2)
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)
    assert {p.dtype for p in fast.model.parameters()} == {torch.float32}


def test_an_update_that_no_recording_fits_beside_goes_on_without(tiny_model, monkeypatch) -> None:
    kernels = KernelConfig(manual_backward=True)
    plain = make(copy.deepcopy(tiny_model), kernels=kernels)
    full = make(tiny_model, kernels=kernels)
    monkeypatch.setattr(full, "fits", lambda windows, length: False)
    assert not full.capture_cuda_graph(16)
    full.set_kernels(full.kernels)
    assert full.backend_name == "written out"
    for _ in range(2):
        assert torch.equal(full(*batch("cpu"), lr=1e-2)[0], plain(*batch("cpu"), lr=1e-2)[0])


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("savings", [Savings(activation_checkpointing=True), Savings(loss_chunk=7)])
def test_saving_memory_changes_no_loss(tiny_model, savings, by_hand) -> None:
    kernels = KernelConfig(manual_backward=by_hand)
    plain = make(copy.deepcopy(tiny_model), kernels=kernels)
    saving = make(tiny_model, kernels=kernels, savings=savings)
    for _ in range(3):
        torch.testing.assert_close(saving(*batch("cpu"), lr=1e-2), plain(*batch("cpu"), lr=1e-2))


def test_recomputing_drops_the_same_activations_again(tiny_model) -> None:
    model = GPT(dataclasses.replace(tiny_model.config, dropout=0.3)).init_weights()
    losses = []
    for savings in (Savings(), Savings(activation_checkpointing=True)):
        torch.manual_seed(5)
        step = make(copy.deepcopy(model), savings=savings)
        losses.append([step(*batch("cpu"), lr=1e-2)[0] for _ in range(3)])
    torch.testing.assert_close(losses[0], losses[1])
