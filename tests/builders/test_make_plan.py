"""`gptforge plan` agrees with training, trains nothing, and leaves no files behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptforge.builders import make_plan as plan_builder
from gptforge.builders import memory_fit, step_timing
from gptforge.cli.plan import _run_rows
from gptforge.config import Config
from gptforge.data.token_dataset import ShardWriter
from gptforge.device import Precision
from gptforge.estimate.formulas import training_memory
from gptforge.kernel_select import DEFAULT_KERNELS
from gptforge.presets import get_preset
from tests.training.runs import build

DEBUG = ("--preset", "debug", "--device", "cpu")
CPU = torch.device("cpu")


@pytest.fixture
def plan(program, play):
    """Plan a small run with more flags; returns the JSON object, after checking the exit code."""

    def make(*args, code: int = 0) -> dict:
        text = () if "--input" in args else ("--input", play)
        done = program("plan", *DEBUG, *text, *args, "--json")
        assert done.code == code, done.err
        found: dict = json.loads(done.out)
        assert found["ok"] == (code == 0)
        return found

    return make


@pytest.fixture
def untimed(monkeypatch) -> None:
    """Replace the measurement by a constant, which saves seconds."""
    monkeypatch.setattr(plan_builder, "time_step", lambda *_, **__: (1.0, "faked"))


def all_files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found if p.is_file()}


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("random_offset", [False, True])
def test_the_plan_agrees_with_the_run(plan, play, tmp_path, random_offset) -> None:
    found = plan("--random_offset", str(random_offset).lower(), "--n_layer", 3, "--max_steps", 37)
    config = dataclasses.replace(
        get_preset("debug"), input=str(play), out_dir=str(tmp_path / "run"), device="cpu"
    )
    trainer = build(
        dataclasses.replace(config, random_offset=random_offset, n_layer=3, max_steps=37)
    )
    step, dataloader = trainer.step_fn, trainer.dataloader
    params = sum(p.numel() for p in step.model.parameters())
    transformer = step.model.transformer
    embeddings = transformer.wte.weight.numel() + transformer.wpe.weight.numel()
    assert found["model"]["parameters"] == params
    assert found["model"]["non_embedding_parameters"] == params - embeddings
    assert found["step"]["micro_batch"] == step.micro_batch_size
    batches = [dataloader.next_batch() for _ in range(37)]
    assert found["run"]["epochs"] == pytest.approx(dataloader.epoch, rel=1e-12)
    assert found["run"]["tokens"] == sum(inputs.numel() for inputs, _ in batches)
    assert found["step"]["tokens"] == batches[0][0].numel()
    assert found["text"]["characters"] == len(play.read_text())
    assert found["text"]["tokens"] == int(len(play.read_text()) * 0.9)


def test_memory_estimate_matches_the_tensors_of_training(play, tmp_path) -> None:
    config = dataclasses.replace(
        get_preset("debug"), input=str(play), out_dir=str(tmp_path / "run"), device="cpu"
    )
    trainer = build(config)
    step = trainer.step_fn
    memory = training_memory(trainer.config, 4, mixed_precision=step.precision.is_mixed)
    step(*trainer.dataloader.next_batch(), lr=1e-3)
    weights = list(step.model.parameters())
    assert memory["weights"] == memory["gradients"] == sum(p.nbytes for p in weights)
    state = [t for state in step.optimizer.state.values() for t in state.values()]
    # Without the step counters.
    moments = sum(t.nbytes for t in state if isinstance(t, torch.Tensor) and t.numel() > 1)
    assert memory["optimizer"] == moments
    assert memory["snapshot"] == memory["weights"] + memory["optimizer"]


def test_the_plan_includes_teachers(plan) -> None:
    found = plan("--teachers", 2, "--teacher_steps", 10, "--max_steps", 20)
    assert any("disk of all 2 comes on top" in line for line in found["warnings"])
    time = found["time"]
    assert time["seconds"] == pytest.approx(20 * time["seconds_per_step"] * (1 + 2 / 3 + 1))
    assert not any("teachers" in line for line in plan()["warnings"])


def test_json_goes_to_stdout_and_the_rest_to_stderr(program, play) -> None:
    done = program("plan", *DEBUG, "--input", play, "--json", "true")
    assert done.code == 0
    found = json.loads(done.out)
    sections = {name: set(value) for name, value in found.items() if isinstance(value, dict)}
    assert sections == {
        "model": {"preset", "n_layer", "n_embd", "n_head", "block_size", "vocab_size",
                  "parameters", "non_embedding_parameters"},
        "text": {"path", "characters", "bytes", "tokenizer", "tokenizer_ids", "tokens",
                 "held_out_tokens", "prepared_now"},
        "step": {"sequences", "context_length", "tokens", "micro_batch", "requested_micro_batch"},
        "run": {"steps", "tokens", "epochs", "tokens_per_parameter"},
        "flops": {"per_token", "per_step", "run", "formula"},
        "memory": {"device", "needed_bytes", "parts", "free_bytes", "fits"},
        "disk": {"out_dir", "checkpoint_bytes", "checkpoints", "needed_bytes", "free_bytes",
                 "fits"},
        "time": {"seconds", "seconds_per_step", "tokens_per_second", "how"},
    }  # fmt: skip
    assert found["warnings"] == []
    assert done.err.startswith("preset: debug")
    assert found["flops"]["run"] == found["flops"]["per_token"] * found["run"]["tokens"]
    assert found["memory"]["needed_bytes"] == sum(found["memory"]["parts"].values())
    assert found["time"]["seconds"] > 0
    assert "measured here" in found["time"]["how"]


@pytest.mark.usefixtures("untimed")
def test_table_has_a_row_for_each_section(program, play) -> None:
    done = program("plan", *DEBUG, "--input", play)
    assert (done.code, done.err) == (0, "")
    names = [line[:12].strip() for line in done.out.splitlines()[1:]]
    expected = ["model", "parameters", "text", "step", "run", "FLOPs", "memory", "disk", "time"]
    assert [name for name in names if name] == expected


def test_a_fraction_of_an_epoch_is_not_shown_as_zero() -> None:
    run = {"steps": 20, "tokens": 5120, "tokens_per_parameter": 0.17}
    rows = [dict(_run_rows(run | {"epochs": epochs}))["run"] for epochs in (0.00119, 51.12)]
    assert "0.0012 epochs" in rows[0]
    assert "51.1 epochs" in rows[1]


@pytest.mark.usefixtures("untimed")
def test_the_run_folder_and_the_working_folder_are_left_alone(program, play, tmp_path) -> None:
    before = all_files(tmp_path)
    assert program("plan", *DEBUG, "--input", play, "--out_dir", "a/b").code == 0
    assert program("plan", *DEBUG, "--input", play).code == 0
    assert all_files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["play.txt"]


@pytest.mark.usefixtures("untimed")
def test_an_existing_run_is_not_looked_at(program, plan, play, tmp_path) -> None:
    flags = (*DEBUG, "--input", play, "--out_dir", "run")
    assert program(*flags).code == 0
    before = all_files(tmp_path)
    for flags in (("--max_steps", 7), ("--n_layer", 1), ("--tokenizer", "byte")):
        new, planned = plan(*flags), plan(*flags, "--out_dir", "run")
        for section in ("model", "step", "run", "flops"):
            assert planned[section] == new[section]
    assert planned["disk"]["out_dir"] == "run"
    assert all_files(tmp_path) == before


@pytest.mark.usefixtures("untimed")
def test_another_program_s_model_is_read_and_not_kept(program, plan, play, tmp_path) -> None:
    pytest.importorskip("transformers")
    assert program(*DEBUG, "--input", play, "--out_dir", "run").code == 0
    assert program("export", "run", "--to", "hf", "exported").code == 0
    before = all_files(tmp_path)
    found = plan("--init_from", "exported", "--out_dir", "new", "--preset", "shakespeare-cpu")
    assert (found["model"]["n_layer"], found["model"]["n_embd"]) == (2, 32)
    # Padding rows of the embedding are not exported, except one: the end-of-text id.
    assert (found["model"]["vocab_size"], found["text"]["tokenizer_ids"]) == (39, 38)
    assert all_files(tmp_path) == before


@pytest.mark.usefixtures("untimed")
def test_a_new_text_is_prepared_once(plan, play) -> None:
    play.write_text(play.read_text() + "A text that was never used before.")
    assert plan()["text"]["prepared_now"] is True
    assert plan()["text"]["prepared_now"] is False


@pytest.mark.parametrize(
    "args",
    [
        ("--max_stps", "3"),
        ("--preset", "gpt5"),
        ("--config", "missing.toml"),
        ("--n_embd", "10", "--n_head", "3"),
        ("--warmup_steps", "600"),
        ("--input", "missing.txt"),
        ("--device", "tpu"),
        ("--vocab_size", "10"),
        ("--context_length", "9999", "--block_size", "9999"),
        ("--init_from", "nowhere"),
        ("--tokenizer", "bert"),
        ("--out_dir", "file"),
        ("--parallel", "fsdp"),
    ],
)
def test_errors_are_those_of_training(program, play, args) -> None:
    Path("file").write_text("in the way")
    flags = ("--input", play, *DEBUG, *args)
    trained, planned = program(*flags), program("plan", *flags)
    assert (trained.code, planned.code) == (2, 2)
    assert planned.err.replace("gptforge plan --help", "gptforge --help") == trained.err


def test_out_of_memory_suggests_what_would_fit(plan, monkeypatch, untimed) -> None:
    sizes = {"n_layer": 9, "n_embd": 64, "context_length": 512, "block_size": 512}
    steps = {"max_steps": 1, "warmup_steps": 1}
    flags = [word for name, value in {**sizes, **steps}.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: None)
    needed = plan(*flags)["memory"]
    assert (needed["free_bytes"], needed["fits"]) == (None, True)
    state = sum(size for name, size in needed["parts"].items() if name != "activations")

    def with_free(free: int, *args) -> tuple[dict, str]:
        monkeypatch.setattr(memory_fit, "usable_memory", lambda _: free)
        found = plan(*flags, *args, code=1)
        return found, "\n".join(found["warnings"])

    one = state + needed["parts"]["activations"] // 4
    found, warning = with_free(int(0.97 * one / 0.92))
    assert found["time"]["seconds"] is None
    assert found["time"]["how"] == "not measured: it does not fit into memory"
    assert "not even a micro-batch of 1 fits; --activation_checkpointing true would" in warning
    assert "alone take" in with_free(state // 2)[1]
    found, warning = with_free(int(1.1 * one / 0.92), "--batch_size", 8)
    assert found["step"]["micro_batch"] == 8
    assert "--batch_size 1 --gradient_accumulation_steps 16 would, with the same" in warning


@pytest.mark.usefixtures("untimed")
def test_micro_batch_is_cut_to_fit_memory(plan, monkeypatch) -> None:
    parts = plan()["memory"]["parts"]
    state = sum(size for name, size in parts.items() if name != "activations")
    two = state + parts["activations"] // 2
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: int(1.01 * two / 0.92))
    assert plan()["step"] | {"requested_micro_batch": 4, "micro_batch": 2} == plan()["step"]


def test_exit_code_is_1_if_memory_is_short(program, play, monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: 1000)
    done = program("plan", *DEBUG, "--input", play)
    assert done.code == 1
    assert "it does not fit" in " ".join(done.out.split())
    assert "warning: memory: " in done.out
    assert done.err == ""


def test_a_smaller_preset_that_fits_is_suggested(monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: 8 * 10**9)
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304)
    estimator = memory_fit.MemoryEstimator(config, Precision(torch.bfloat16, ""), CPU)
    assert "--preset gpt2 would fit" in estimator.suggest_fix(1, is_explicit=False)


def test_what_fits_in_fp8_is_not_what_fp8_cannot_do(monkeypatch) -> None:
    """It recomputes no dropout, so it has no activation checkpointing with dropout."""
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: 44 * 10**8)
    for dropout, flags in ((0.0, "--activation_checkpointing true"), (0.1, "--context_length 512")):
        config = dataclasses.replace(get_preset("gpt2"), vocab_size=50304, dropout=dropout)
        precision = Precision(torch.bfloat16, "", float8=True)
        estimator = memory_fit.MemoryEstimator(config, precision, torch.device("cuda"))
        fix = estimator.suggest_fix(1, is_explicit=False)
        assert flags in fix, fix
        assert ("--activation_checkpointing" in fix) == (not dropout)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("free", "message"), [(1000, "no room for one checkpoint"), (10**7, "it would fill up")]
)
def test_a_full_disk_is_reported(plan, monkeypatch, free, message) -> None:
    needed = plan()["disk"]
    assert needed["checkpoints"] == 5
    assert needed["needed_bytes"] > 5 * needed["checkpoint_bytes"] > 10**7
    usage = shutil._ntuple_diskusage(10**9, 0, max(free, 0))
    monkeypatch.setattr(plan_builder, "HEADROOM_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert message in plan(code=1)["warnings"][-1]


@pytest.mark.usefixtures("untimed")
def test_a_disk_of_unknown_size_is_not_full(program, play, monkeypatch) -> None:
    usage = shutil._ntuple_diskusage(0, 0, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = program("plan", *DEBUG, "--input", play)
    assert done.code == 0
    assert "how much is free is unknown" in done.out


@pytest.mark.usefixtures("untimed")
def test_few_saves_need_less_disk(plan) -> None:
    flags = ("--max_steps", 5, "--save_every", 100, "--eval_every", 100)
    assert plan(*flags)["disk"]["checkpoints"] == 1


@pytest.mark.usefixtures("untimed")
def test_shards_of_this_and_other_programs(program, plan, play) -> None:
    prepared = program("prepare", play, "--out", "shards", "--tokenizer", "byte")
    assert prepared.code == 0, prepared.err
    before = all_files(Path("shards"))
    text = plan("--input", "shards")["text"]
    assert (text["tokenizer"], text["path"]) == ("byte", "shards")
    assert text["tokens"] + text["held_out_tokens"] == len(play.read_text())
    assert all_files(Path("shards")) == before
    writer = ShardWriter(Path("other.bin"), np.dtype(np.uint16))
    writer.write(np.arange(3000, dtype=np.uint16))
    writer.close()
    text = plan("--input", "other.bin", "--tokenizer", "gpt2")["text"]
    assert (text["tokens"], text["held_out_tokens"], text["characters"]) == (2700, 300, 0)


def warning(config: Config, *, epochs: float, tokens: int, vocab_size: int = 50304) -> str:
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return plan_builder.memorization_warning(config, epochs, tokens=tokens)


def test_memorization_is_predicted_where_it_was_observed() -> None:
    # GPT-2 small on all of Shakespeare overfitted.
    assert "overfitting" in warning(get_preset("gpt2"), epochs=51, tokens=1_282_289)
    # The two character models on the same text still improved at the end.
    characters = 4_314_609
    for name, epochs in (("shakespeare-cpu", 1.4), ("shakespeare", 19.0)):
        assert warning(get_preset(name), epochs=epochs, tokens=characters, vocab_size=128) == ""
    # Few epochs, or much more text than the model can store.
    assert warning(get_preset("gpt2"), epochs=3.9, tokens=1_282_289) == ""
    assert warning(get_preset("gpt2"), epochs=51, tokens=2 * 10**9) == ""


def test_a_large_model_is_timed_by_extrapolating_from_two_small_ones(monkeypatch) -> None:
    depths = []

    class FakeStep:
        kernels = DEFAULT_KERNELS

        def __init__(self, n_layer: int) -> None:
            self.n_layer = n_layer

    def dry_run(step: FakeStep, sequences: int, context_length: int) -> float:
        assert context_length == 1024
        return sequences * (3.0 + 2.0 * step.n_layer)

    def build_fake(config: Config, explicit) -> FakeStep:
        depths.append(config.n_layer)
        assert (config.init_from, config.device) == ("", "cpu")
        return FakeStep(config.n_layer)

    monkeypatch.setattr(step_timing, "build_bench_step", build_fake)
    monkeypatch.setattr(step_timing, "dry_run", dry_run)
    monkeypatch.setattr(step_timing, "time_optimizer", lambda step: 128.0 * (5.0 + step.n_layer))
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304, init_from="somewhere")
    seconds, how = step_timing.time_step(config, (), device=CPU, micro_batch=8)
    assert seconds == pytest.approx(8.0 + 3.0 * 48)
    assert depths == [1, 4]
    assert "through 1 and 4 of 48 layers" in how
    small = dataclasses.replace(config, n_layer=12, n_embd=768)
    depths.clear()
    seconds, how = step_timing.time_step(small, (), device=CPU, micro_batch=8)
    assert (depths, seconds) == ([12], pytest.approx(8.0 + 3.0 * 12))


@pytest.mark.parametrize(("cpu_share", "is_reported"), [(0.5, True), (1.0, False)])
def test_other_programs_on_the_cores_are_reported(monkeypatch, cpu_share, is_reported) -> None:
    class FakeStep:
        kernels = DEFAULT_KERNELS

    def dry_run(step: FakeStep, sequences: int, context_length: int) -> float:
        clock[0] += 10.0 * cpu_share * torch.get_num_threads()
        return 10.0

    clock = [0.0]
    monkeypatch.setattr(step_timing, "dry_run", dry_run)
    monkeypatch.setattr(step_timing, "time_optimizer", lambda step: 1.0)
    monkeypatch.setattr(step_timing, "build_bench_step", lambda *_: FakeStep())
    monkeypatch.setattr(step_timing.time, "process_time", lambda: clock[0])
    config = dataclasses.replace(get_preset("debug"), vocab_size=64)
    _, how = step_timing.time_step(config, (), device=CPU, micro_batch=4)
    assert ("other programs took 50% of the cores" in how) == is_reported


def test_help_works_without_torch() -> None:
    code = (
        "import sys; from gptforge.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit as leaving: assert leaving.code in (0, None)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max_steps" in done.stdout and "--json" in done.stdout


@pytest.mark.usefixtures("untimed")
def test_learned_tokenizer_is_reported(plan) -> None:
    pytest.importorskip("tokenizers")
    found = plan("--tokenizer", "bpe", "--vocab_size", 300)
    assert (found["text"]["tokenizer"], found["text"]["tokenizer_ids"]) == ("bpe", 300)
    assert found["model"]["vocab_size"] == 300
