"""Learning from teachers: the loss, its gradients, and runs that train their teachers first."""

import copy
import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptforge.builders import build_trainer as build_trainer_module
from gptforge.builders.build_train_step import build_train_step
from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.teachers import check_teachers, teacher_config, teacher_configs
from gptforge.builders.text_presets import resolve_auto
from gptforge.checkpoint.format import read_config, read_tensors
from gptforge.cli.parsing import parse_train_args
from gptforge.cli.train import run_training
from gptforge.config import Config
from gptforge.distributed import SINGLE_PROCESS, Comm
from gptforge.errors import UserError
from gptforge.kernel_select import KernelConfig
from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.model import GPT
from gptforge.report.log_handler import log_to
from gptforge.report.run_report import RunReport
from gptforge.shell import Start
from gptforge.training.distillation import Distillation
from gptforge.training.trainer import Trainer
from tests.conftest import TINY
from tests.distributed.runs import assert_same_run, train
from tests.distributed.spawn import on_ranks
from tests.programs import DEBUG
from tests.training.runs import StopAfter, build, events, last
from tests.training.steps import BFLOAT16, FLOAT32, make_batch, make_step

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

AUTOGRAD = KernelConfig(fused_cross_entropy=True)
MANUAL = KernelConfig(manual_backward=True, fused_cross_entropy=True)


@pytest.fixture(autouse=True)
def _no_plots_or_samples(monkeypatch) -> None:
    """They take most of the time of a tiny run."""
    monkeypatch.setattr(Trainer, "sample", lambda self: None)
    monkeypatch.setattr(RunReport, "plot", lambda self, force=False: None)


def make_teachers(count: int, weight: float, device: torch.device | str = "cpu") -> Distillation:
    teachers = []
    for seed in range(1, count + 1):
        teacher = GPT(TINY).init_weights(torch.Generator().manual_seed(seed))
        # Or all probabilities would be nearly uniform.
        teacher.transformer["ln_f"].weight.data *= 20
        teachers.append(teacher.to(device).eval().requires_grad_(False))
    return Distillation(teachers, weight)


def gradients(model: GPT) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def reference_gradients(
    model: GPT, distillation: Distillation, idx: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Gradients in float64, from the definition."""
    model = copy.deepcopy(model).double()
    teachers = [copy.deepcopy(teacher).double() for teacher in distillation.teachers]
    probs = sum(teacher(idx).softmax(-1) for teacher in teachers) / len(teachers)
    one_hot = F.one_hot(targets.clamp(0), TINY.vocab_size)
    mixture = (1 - distillation.weight) * one_hot + distillation.weight * probs
    log_probs = model(idx).log_softmax(-1)
    loss = -((mixture * log_probs).sum(-1) * (targets != IGNORE_INDEX)).sum()
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("kernels", [AUTOGRAD, MANUAL], ids=["autograd", "manual"])
@pytest.mark.parametrize(("count", "weight"), [(1, 0.5), (3, 0.3), (2, 1.0)])
@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_gradients_match_the_definition(
    tiny_model, device, kernels, count, weight, precision
) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
    distillation = make_teachers(count, weight, device)
    tiny_model.to(device)
    idx, targets = make_batch(device)
    targets = targets.clone()
    targets[0, :5] = IGNORE_INDEX
    expected = reference_gradients(tiny_model, distillation, idx, targets)
    step = make_step(
        tiny_model, kernels=kernels, precision=precision, loss_chunk=24, distillation=distillation
    )
    step.backend.zero_grad()
    loss = step.backend.forward_backward(idx, targets, 1.0)
    tol = 3e-2 if precision is BFLOAT16 else 1e-2 if device.type == "cuda" else 1e-5  # TF32
    assert (gradients(step.model) - expected).norm() < tol * expected.norm()
    # What is logged is the cross-entropy of the text.
    torch.testing.assert_close(loss, tiny_model(idx, targets).detach(), rtol=tol, atol=0)


def test_teachers_have_no_memory_for_gradients(tiny_model) -> None:
    step = make_step(tiny_model, kernels=MANUAL, distillation=make_teachers(2, 0.5))
    assert all(teacher.grads.flat.is_meta for teacher in step.backend._teachers)


@pytest.mark.parametrize("kernels", [AUTOGRAD, MANUAL], ids=["autograd", "manual"])
def test_weight_0_changes_no_bit(tiny_model, kernels) -> None:
    idx, targets = make_batch("cpu")
    steps = [
        make_step(tiny_model, kernels=kernels, batch_size=3, **options)
        for options in ({}, {"distillation": make_teachers(2, 0.0)})
    ]
    for _ in range(3):
        losses = [step(idx, targets, lr=0.1) for step in steps]
        assert losses[0] == losses[1]
    for p, q in zip(steps[0].model.parameters(), steps[1].model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("kernels", [AUTOGRAD, MANUAL], ids=["autograd", "manual"])
def test_a_uniform_teacher_smooths_labels(tiny_model, kernels) -> None:
    distillation = make_teachers(1, 0.1)
    # With a final LayerNorm of zeros all logits are zero.
    for parameter in distillation.teachers[0].transformer["ln_f"].parameters():
        parameter.zero_()
    idx, targets = make_batch("cpu")
    step = make_step(tiny_model, kernels=kernels, distillation=distillation)
    step.backend.zero_grad()
    step.backend.forward_backward(idx, targets, 1.0)
    logits = tiny_model(idx).flatten(0, 1)
    F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=0.1).backward()
    torch.testing.assert_close(gradients(step.model), gradients(tiny_model), rtol=1e-4, atol=1e-5)


@needs_cuda
def test_a_cuda_graph_includes_the_teachers(tiny_model) -> None:
    pytest.importorskip("triton")
    distillation = make_teachers(2, 0.5, "cuda")
    idx, targets = make_batch("cuda")
    weights = []
    for captures in (False, True):
        step = make_step(
            tiny_model.cuda(), kernels=MANUAL, precision=BFLOAT16, distillation=distillation
        )
        assert not captures or step.capture_cuda_graph(idx.size(1))
        for tokens in (idx, targets, idx):
            step(tokens, targets, lr=1e-3)
        weights.append(torch.cat([p.detach().flatten() for p in step.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)


def with_teachers(config: Config, **changes) -> Config:
    return dataclasses.replace(config, teachers=2, teacher_steps=12, **changes)


def weights(config: Config) -> torch.Tensor:
    tensors = read_tensors(last(config), "model.safetensors")
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_teachers_are_ordinary_runs_with_other_seeds(config, tmp_path) -> None:
    config = with_teachers(config)
    build(config).fit()
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    for number in (1, 2):
        teacher = teacher_config(config, number)
        ordinary = dataclasses.replace(
            config,
            out_dir=str(tmp_path / f"ordinary-{number}"),
            seed=config.seed + number,
            max_steps=12,
            teachers=0,
            teacher_steps=0,
        )
        build(ordinary).fit()
        assert torch.equal(weights(teacher), weights(ordinary))
    assert not torch.equal(weights(teacher_config(config, 1)), weights(teacher))


@pytest.mark.parametrize("preset", ["auto", "shakespeare-cpu"])
def test_no_preset_fits_a_teacher_again(config, preset) -> None:
    teacher = teacher_config(dataclasses.replace(config, preset=preset, time_limit=1.0), 1)
    assert resolve_auto(teacher, (), device="cpu") == teacher


def test_weight_0_is_ordinary_training(config, tmp_path) -> None:
    student = with_teachers(config, distill_weight=0.0)
    build(student).fit()
    ordinary = dataclasses.replace(config, out_dir=str(tmp_path / "ordinary"))
    build(ordinary).fit()
    assert torch.equal(weights(student), weights(ordinary))
    student = with_teachers(config, out_dir=str(tmp_path / "distilled"))
    build(student).fit()
    assert not torch.equal(weights(student), weights(ordinary))


@pytest.mark.parametrize("stops", [(17,), (5, 9, 15, 2)], ids=["teacher 2", "all"])
def test_a_stopped_run_resumes_to_identical_weights(config, tmp_path, monkeypatch, stops) -> None:
    """`stops` are steps of the process, over teachers of 12 steps and a student of 20."""
    undisturbed = with_teachers(config, out_dir=str(tmp_path / "undisturbed"))
    build(undisturbed).fit()
    config = with_teachers(config)
    for stop in stops:
        stop_signal = StopAfter(stop)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "stop_reason", lambda self: stop_signal.stop_reason())  # noqa: B023
            built = build_trainer(config, explicit=())
            reason = built.fit() if isinstance(built, Trainer) else built
        assert reason == "interrupted"
    assert build(config).fit() == "finished"
    assert build_trainer(config, explicit=()) == "finished"
    assert torch.equal(weights(config), weights(undisturbed))
    for left, right in zip(events(config, "train"), events(undisturbed, "train"), strict=True):
        assert (left["step"], left["loss"]) == (right["step"], right["loss"])


def test_a_signal_between_teachers_is_not_lost(config, monkeypatch) -> None:
    config = with_teachers(config)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(
            build_trainer_module.gc, "collect", lambda: signal.raise_signal(signal.SIGINT)
        )
        assert build_trainer(config, explicit=()) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert last(teacher_config(config, 1)).name == "step-000012"
    assert not Path(teacher_config(config, 2).out_dir).exists()
    assert build(config).fit() == "finished"


def run_with_signal_on_rank_1(comm: Comm, flags: list[str]) -> list[str]:
    """Send SIGTERM to rank 1 before each run after the first one."""
    before = signal.getsignal(signal.SIGTERM)
    num_built = 0

    def build_step(*args, **kwargs):
        nonlocal num_built
        num_built += 1
        if num_built > 1 and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return build_train_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_trainer_module, "build_train_step", build_step)
        patch.setattr("gptforge.distributed.init_distributed", lambda device: comm)
        patch.setattr(Comm, "shutdown", lambda self: None)  # `on_ranks` does
        config, explicit = parse_train_args(flags)
        reason, _, _ = run_training(
            config, explicit, start=Start(), logging_as=log_to(lambda text: None)
        )
    assert signal.getsignal(signal.SIGTERM) is before
    return [reason, *map(str, Path("run").rglob("step-*"))]


def test_a_signal_to_one_rank_between_teachers_stops_all(play, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [*DEBUG, "--input", play, "--out_dir", "run", "--device", "cpu", "--sample_every", "0"]
    flags += ["--teachers", "2", "--teacher_steps", "4", "--max_steps", "6"]
    for last_saved in (
        "run/teachers/teacher-2/checkpoints/step-000001",
        "run/checkpoints/step-000001",
    ):
        for reason, *paths in on_ranks(2, run_with_signal_on_rank_1, list(map(str, flags))):
            assert reason == "terminated" and last_saved in paths
    assert "run/teachers/teacher-2/checkpoints/step-000004" in paths


def test_a_teacher_is_resumed_as_a_run_of_its_own(program, play, monkeypatch) -> None:
    flags = (*DEBUG, "--input", play, "--out_dir", "run", "--teachers", 1)
    stop = StopAfter(5)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "stop_reason", lambda self: stop.stop_reason())
        program(*flags)
    done = program("--resume", "run/teachers/teacher-1", "--device", "cpu")
    assert (done.code, "Resuming from step-000005" in done.out) == (0, True), done.err
    done = program("--resume", "run")
    assert "run/teachers/teacher-1 is finished\n" in done.out
    assert "Raise" not in done.out


def test_two_ranks_train_as_one(config, tmp_path) -> None:
    config = with_teachers(config, dropout=0.0)
    assert train(2, config) == {"finished"}
    one = dataclasses.replace(config, out_dir=str(tmp_path / "one-rank"))
    assert train(1, one) == {"finished"}
    assert_same_run(config, one)
    with pytest.raises(UserError, match="needs --parallel ddp"):
        check_teachers(dataclasses.replace(one, parallel="fsdp"))


def test_more_steps_keep_the_teachers_and_a_damaged_one_is_refused(config) -> None:
    config = dataclasses.replace(config, teachers=2)
    build(config).fit()
    config = dataclasses.replace(config, max_steps=22)
    build(config).fit()
    assert last(teacher_config(config, 2)).name == "step-000020"
    longer = dataclasses.replace(config, max_steps=24)
    teacher = last(teacher_config(config, 2)) / "model.safetensors"
    intact = teacher.read_bytes()
    teacher.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(UserError, match=r"teacher-2 holds no finished teacher .*damaged"):
        build(longer)


def test_teachers_keep_their_steps_when_max_steps_are_raised_before_they_are_done(
    config, monkeypatch
) -> None:
    config = dataclasses.replace(config, teachers=2, max_steps=8)
    stop = StopAfter(10)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "stop_reason", lambda self: stop.stop_reason())
        assert build_trainer(config, explicit=()) == "interrupted"
    longer = dataclasses.replace(config, max_steps=20)
    assert build(longer).fit() == "finished"
    for number in (1, 2):
        teacher = dataclasses.replace(config, out_dir=f"{config.out_dir}/teachers/teacher-{number}")
        assert last(teacher).name == "step-000008"
    for steps in (5, 20):
        explicit = dataclasses.replace(longer, teacher_steps=steps)
        with pytest.raises(UserError, match=f"--teacher_steps {steps}, but .* began with 8"):
            teacher_configs(explicit, ("teacher_steps",), SINGLE_PROCESS)
    explicit = dataclasses.replace(longer, teacher_steps=5, out_dir=f"{config.out_dir}-new")
    teachers = teacher_configs(explicit, ("teacher_steps",), SINGLE_PROCESS)
    assert [teacher.max_steps for teacher in teachers] == [5] * 2


def test_flags_of_a_resume_that_stops_in_a_teacher_are_kept_unless_refused(
    program, play, monkeypatch
) -> None:
    def stopped_in_a_teacher(*flags: object) -> tuple[int, str]:
        stop = StopAfter(3)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "stop_reason", lambda self: stop.stop_reason())
            done = program(*flags)
            return done.code, done.err

    stopped_in_a_teacher(*DEBUG, "--input", play, "--out_dir", "run", "--teachers", 1)
    steps = read_config(Path("run"), with_model=False).max_steps
    code, error = stopped_in_a_teacher("--resume", "run", "--ema", 0.9)
    assert code == 2 and "leave these flags out to resume it" in error
    flags = ("--max_steps", steps + 2, "--distill_weight", 0.9)
    assert stopped_in_a_teacher("--resume", "run", *flags)[0] != 2
    assert program("--resume", "run").code == 0
    config = read_config(Path("run/checkpoints/last"))
    assert (config.max_steps, config.distill_weight) == (steps + 2, 0.9)
    teacher = read_config(Path("run/teachers/teacher-1/checkpoints/last"))
    assert teacher.max_steps == steps


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_before_it_is_read(config, tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is a pipe, and --teachers need a file"):
        check_teachers(with_teachers(config, input=str(tmp_path / "pipe")))


def test_restart_moves_the_teachers_too(config) -> None:
    config = with_teachers(config)
    build(config).fit()
    build(dataclasses.replace(config, restart=True, max_lr=1e-4)).fit()
    for folder in (config.out_dir, f"{config.out_dir}.old-1"):
        assert (Path(folder) / "teachers" / "teacher-2" / "checkpoints" / "last").exists()
    assert not list(Path(config.out_dir).rglob("*.old-1"))


def test_other_teachers_are_refused(config) -> None:
    build(config).fit()
    with pytest.raises(UserError, match="teachers: 0 -> 2"):
        build(with_teachers(config))
    assert not (Path(config.out_dir) / "teachers").exists()


def test_a_large_vocabulary_is_refused(config) -> None:
    with pytest.raises(UserError, match="at most 8,192 rows, and this one has 50,304"):
        build(with_teachers(config, vocab_size=50304))
    assert not Path(config.out_dir).exists()
