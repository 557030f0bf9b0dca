"""`plan`: the figures are those that training comes to, and nothing is trained or left behind."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptforge.builders import memory_fit, plan, step_timing
from gptforge.builders.memory_fit import estimate_memory
from gptforge.cli.plan import _run
from gptforge.config import Config
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.device import Precision
from gptforge.estimate.plan import RunPlan
from gptforge.kernel_select import DEFAULT_KERNELS
from gptforge.presets import get_preset
from tests.train.runs import build

DEBUG = ("--preset", "debug", "--device", "cpu")


@pytest.fixture
def plan(program, play):
    """The plan of a small run as its JSON object, with other flags; it has to end with `code`."""

    def make(*args, code: int = 0) -> dict:
        where = () if "--input" in args else ("--input", play)
        done = program("plan", *DEBUG, *where, *args, "--json")
        assert done.code == code, done.err
        found: dict = json.loads(done.out)
        assert found["ok"] == (code == 0)
        return found

    return make


def all_files(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in found if p.is_file()}


@pytest.mark.parametrize("stagger", [False, True])
def test_the_figures_are_those_of_the_run(plan, play, tmp_path, stagger) -> None:
    found = plan("--stagger", str(stagger).lower(), "--n_layer", 3, "--max_steps", 37)
    config = dataclasses.replace(
        get_preset("debug"), input=str(play), out_dir=str(tmp_path / "run"), device="cpu"
    )
    trainer = build(dataclasses.replace(config, random_offset=stagger, n_layer=3, max_steps=37))
    step, loader = trainer.step_fn, trainer.dataloader
    assert found["model"]["parameters"] == sum(p.numel() for p in step.model.parameters())
    tables = step.model.transformer.wte.weight.numel() + step.model.transformer.wpe.weight.numel()
    assert found["model"]["parameters_without_tables"] == found["model"]["parameters"] - tables
    assert found["step"]["micro_batch"] == step.micro_batch_size
    batches = [loader.next_batch() for _ in range(37)]
    assert found["run"]["epochs"] == pytest.approx(loader.epoch, rel=1e-12)
    assert found["run"]["tokens"] == sum(inputs.numel() for inputs, _ in batches)
    assert found["step"]["tokens"] == batches[0][0].numel()
    assert found["text"]["characters"] == len(play.read_text())
    assert found["text"]["tokens"] == int(len(play.read_text()) * 0.9)


def test_memory_names_what_the_objects_really_take(play, tmp_path) -> None:
    config = dataclasses.replace(
        get_preset("debug"), input=str(play), out_dir=str(tmp_path / "run"), device="cpu"
    )
    trainer = build(config)
    step = trainer.step_fn
    parts = estimate_memory(trainer.config, 4, step.precision, step.kernels)
    step(*trainer.dataloader.next_batch(), lr=1e-3)
    weights = list(step.model.parameters())
    assert parts["weights"] == parts["gradients"] == sum(p.nbytes for p in weights)
    moments = [t for state in step.optimizer.state.values() for t in state.values()]
    held = sum(t.nbytes for t in moments if isinstance(t, torch.Tensor) and t.numel() > 1)
    # Biases of one number do not exist here; counters of steps are left out.
    assert parts["optimizer"] == held
    assert parts["snapshot"] == parts["weights"] + parts["optimizer"]


def test_it_is_one_json_object_and_the_rest_goes_to_standard_error(program, play) -> None:
    done = program("plan", *DEBUG, "--input", play, "--json", "true")
    assert done.code == 0
    found = json.loads(done.out)
    sections = {name: set(value) for name, value in found.items() if isinstance(value, dict)}
    assert sections == {
        "model": {"preset", "n_layer", "n_embd", "n_head", "block_size", "vocab_size",
                  "parameters", "parameters_without_tables"},
        "text": {"path", "characters", "bytes", "tokenizer", "tokenizer_ids", "tokens",
                 "held_out_tokens", "prepared_now"},
        "step": {"windows", "context_length", "tokens", "micro_batch", "micro_batch_asked"},
        "run": {"steps", "tokens", "epochs", "tokens_per_parameter"},
        "flops": {"per_token", "per_step", "run", "formula"},
        "memory": {"device", "needed_bytes", "parts", "free_bytes", "fits"},
        "disk": {"out_dir", "checkpoint_bytes", "checkpoints", "needed_bytes", "free_bytes",
                 "fits", "steps_saved"},
        "time": {"seconds", "seconds_a_step", "tokens_per_second", "how"},
    }  # fmt: skip
    assert found["warnings"] == []
    assert done.err.startswith("preset: debug")
    assert found["flops"]["run"] == found["flops"]["per_token"] * found["run"]["tokens"]
    assert found["memory"]["needed_bytes"] == sum(found["memory"]["parts"].values())
    assert found["time"]["seconds"] > 0
    assert "measured here" in found["time"]["how"]


def test_the_table_has_a_row_for_each_thing(program, play) -> None:
    done = program("plan", *DEBUG, "--input", play)
    assert (done.code, done.err) == (0, "")
    names = [line[:12].strip() for line in done.out.splitlines()[1:]]
    wanted = ["model", "parameters", "text", "a step", "the run", "FLOPs", "memory", "disk", "time"]
    assert [name for name in names if name] == wanted


def test_a_run_that_reads_little_of_its_text_reads_more_than_nothing() -> None:
    told = [dict(_run(RunPlan(20, 5120, epochs, 0.17)))["the run"] for epochs in (0.00119, 51.12)]
    assert "0.0012 epochs" in told[0]
    assert "51.1 epochs" in told[1]


def test_nothing_is_written_where_it_is_called(program, play, tmp_path) -> None:
    before = all_files(tmp_path)
    assert program("plan", *DEBUG, "--input", play, "--out_dir", "a/b").code == 0
    assert program("plan", *DEBUG, "--input", play).code == 0
    assert all_files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["play.txt"]


def test_a_run_that_is_there_is_mentioned_and_left_alone(program, plan, play, tmp_path) -> None:
    assert program(*DEBUG, "--input", play, "--out_dir", "run").code == 0
    (tmp_path / "run/checkpoints/step-000020/model.safetensors").write_bytes(b"damaged")
    before = all_files(tmp_path)
    assert plan("--out_dir", "run")["disk"]["steps_saved"] == 20
    # Another shape, which training would refuse in this folder, may be asked about all the same.
    assert plan("--out_dir", "run", "--n_layer", 1, "--overwrite")["disk"]["steps_saved"] == 20
    assert all_files(tmp_path) == before


def test_a_run_of_another_configuration_is_refused_as_by_training(program, play) -> None:
    begun = (*DEBUG, "--input", play, "--out_dir", "run")
    assert program(*begun).code == 0
    assert program("plan", *begun).code == 0
    refused = [program(*command, *begun, "--seed", 3) for command in (("plan",), ())]
    assert [done.code for done in refused] == [2, 2]
    words = [done.err.splitlines()[-1] for done in refused]
    assert words[0] == words[1] and "seed: 1337 -> 3" in words[0]


def test_a_model_of_another_program_is_read_and_not_kept(program, plan, play, tmp_path) -> None:
    pytest.importorskip("transformers")
    assert program(*DEBUG, "--input", play, "--out_dir", "run").code == 0
    assert program("export", "run", "--to", "hf", "theirs").code == 0
    before = all_files(tmp_path)
    found = plan("--init_from", "theirs", "--out_dir", "new", "--preset", "shakespeare-cpu")
    assert (found["model"]["n_layer"], found["model"]["n_embd"]) == (2, 32)
    # Rows of the embedding that pad it are not exported, but for one: the end-of-text id.
    assert (found["model"]["vocab_size"], found["text"]["tokenizer_ids"]) == (39, 38)
    assert all_files(tmp_path) == before


def test_a_text_is_prepared_once_and_that_is_said(plan, play) -> None:
    play.write_text(play.read_text() + "A text that nobody has seen before.")
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
        ("--out_dir", ".", "--overwrite"),
        ("--out_dir", "."),
        ("--parallel", "fsdp"),
    ],
)
def test_a_mistake_is_told_in_the_words_of_training(program, play, args) -> None:
    Path("file").write_text("in the way")
    flags = ("--input", play, *DEBUG, *args)
    trained, planned = program(*flags), program("plan", *flags)
    assert (trained.code, planned.code) == (2, 2)
    assert planned.err.replace("gptforge plan --help", "gptforge --help") == trained.err


def test_memory_that_is_not_there_is_said_with_what_would_fit(plan, monkeypatch) -> None:
    monkeypatch.setattr(plan, "dry_run", None)
    big = (
        "--n_layer",
        9,
        "--n_embd",
        64,
        "--context_length",
        512,
        "--block_size",
        512,
        "--max_steps",
        1,
    )
    big = (*big, "--warmup_steps", 1)
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: None)
    needed = plan_without_time(plan, big, monkeypatch)["memory"]
    assert (needed["free_bytes"], needed["fits"]) == (None, True)
    state = sum(size for name, size in needed["parts"].items() if name != "activations")

    def with_free(free: int, *args, code: int = 1) -> tuple[dict, str]:
        monkeypatch.setattr(memory_fit, "usable_memory", lambda _: free)
        found = plan(*big, *args, code=code)
        return found, "\n".join(found["warnings"])

    one = state + needed["parts"]["activations"] // 4
    found, warning = with_free(int(0.97 * one / 0.92))
    assert found["time"]["seconds"] is None
    assert found["time"]["how"] == "not measured: it does not fit into memory"
    assert "not even one window fits; --activation_checkpointing true would" in warning
    assert "alone take" in with_free(state // 2)[1]
    found, warning = with_free(int(1.1 * one / 0.92), "--batch_size", 8)
    assert found["step"]["micro_batch"] == 8
    assert "--batch_size 1 --gradient_accumulation_steps 16 would, and learns the same" in warning


def plan_without_time(plan, args, monkeypatch) -> dict:
    with monkeypatch.context() as patch:
        patch.setattr(plan, "dry_run", lambda *a, **b: step_timing.StepTiming(1.0, "faked"))
        found: dict = plan(*args)
    return found


def test_the_micro_batch_is_cut_to_the_memory_as_training_cuts_it(plan, monkeypatch) -> None:
    parts = plan()["memory"]["parts"]
    state = sum(size for name, size in parts.items() if name != "activations")
    two = state + parts["activations"] // 2
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: int(1.01 * two / 0.92))
    assert plan()["step"] | {"micro_batch_asked": 4, "micro_batch": 2} == plan()["step"]


def test_the_command_ends_with_1_where_memory_is_short(program, play, monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: 1000)
    done = program("plan", *DEBUG, "--input", play)
    assert done.code == 1
    assert "it does not fit" in " ".join(done.out.split())
    assert "warning: memory: " in done.out
    assert done.err == ""


def test_a_smaller_preset_that_fits_is_named(monkeypatch) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda _: 8 * 10**9)
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304)
    need = memory_fit.MemoryEstimator(config, Precision(torch.bfloat16, ""), torch.device("cpu"))
    assert "--preset gpt2 would fit" in need.suggest_fix(1, is_explicit=False)


@pytest.mark.parametrize(
    ("free", "words"), [(1000, "not even one checkpoint"), (10**7, "fill up on the way")]
)
def test_a_disk_without_room_is_said(plan, monkeypatch, free, words) -> None:
    needed = plan()["disk"]
    assert needed["checkpoints"] == 4
    assert needed["needed_bytes"] > 4 * needed["checkpoint_bytes"] > 10**7
    usage = shutil._ntuple_diskusage(10**9, 0, max(free, 0))
    monkeypatch.setattr(plan, "SPARE_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert words in plan(code=1)["warnings"][-1]


def test_few_saves_take_less_room(plan) -> None:
    flags = ("--max_steps", 5, "--save_every", 100, "--eval_every", 100)
    assert plan(*flags)["disk"]["checkpoints"] == 1


def test_prepared_data_and_shards_of_others_are_planned_with(program, plan, play) -> None:
    made = program("prepare", play, "--out", "shards", "--tokenizer", "byte")
    assert made.code == 0, made.err
    before = all_files(Path("shards"))
    text = plan("--input", "shards")["text"]
    assert (text["tokenizer"], text["path"]) == ("byte", "shards")
    assert text["tokens"] + text["held_out_tokens"] == len(play.read_text())
    assert all_files(Path("shards")) == before
    writer = ShardWriter(Path("theirs.bin"), np.dtype(np.uint16))
    writer.write(np.arange(3000, dtype=np.uint16))
    writer.close()
    text = plan("--input", "theirs.bin", "--tokenizer", "gpt2")["text"]
    assert (text["tokens"], text["held_out_tokens"], text["characters"]) == (2700, 300, 0)


def advice(config: Config, *, epochs: float, tokens: int, vocab_size: int = 50304) -> str:
    config = dataclasses.replace(config, vocab_size=vocab_size)
    return plan.memorization_warning(config, RunPlan(1, 1, epochs, 1.0), tokens=tokens)


def test_learning_by_heart_is_foretold_where_it_was_seen() -> None:
    # GPT-2 small on all of Shakespeare: the verdict of that run says that it came to be so.
    assert "by heart" in advice(get_preset("gpt2"), epochs=51, tokens=1_282_289)
    # The two character models on the same text still got better at their ends.
    characters = 4_314_609
    for name, epochs in (("shakespeare-cpu", 1.4), ("shakespeare", 19.0)):
        assert advice(get_preset(name), epochs=epochs, tokens=characters, vocab_size=128) == ""
    # Read a few times only, or far more text than the model has room for.
    assert advice(get_preset("gpt2"), epochs=3.9, tokens=1_282_289) == ""
    assert advice(get_preset("gpt2"), epochs=51, tokens=2 * 10**9) == ""


def test_a_large_model_is_timed_by_a_line_through_two_small_ones(monkeypatch) -> None:
    built = []

    class Step:
        kernels = DEFAULT_KERNELS

        def __init__(self, layers: int) -> None:
            self.layers = layers

        def rehearse(self, windows: int, context_length: int) -> float:
            assert context_length == 1024
            return windows * (3.0 + 2.0 * self.layers)

    def build_step(config: Config, given, say) -> Step:
        built.append(config.n_layer)
        assert (config.init_from, config.device) == ("", "cpu")
        return Step(config.n_layer)

    monkeypatch.setattr(step_timing, "build_step", build_step)
    config = dataclasses.replace(get_preset("gpt2-xl"), vocab_size=50304, init_from="somewhere")
    found = step_timing.time_step(config, (), device=torch.device("cpu"), micro_batch=8)
    assert found.seconds_per_sequence == pytest.approx(3.0 + 2.0 * 48)
    assert built == [1, 4]
    assert "through 1 and 4 of 48 layers" in found.how
    small = dataclasses.replace(config, n_layer=12, n_embd=768)
    built.clear()
    found = step_timing.time_step(small, (), device=torch.device("cpu"), micro_batch=8)
    assert (built, found.seconds_per_sequence) == ([12], pytest.approx(3.0 + 2.0 * 12))


@pytest.mark.parametrize(("share", "is_said"), [(0.5, True), (1.0, False)])
def test_a_figure_taken_beside_other_programs_says_so(monkeypatch, share, is_said) -> None:
    class Step:
        kernels = DEFAULT_KERNELS

        def rehearse(self, windows: int, context_length: int) -> float:
            clock[0] += 10.0 * share * torch.get_num_threads()
            return 10.0

    clock = [0.0]
    monkeypatch.setattr(step_timing, "build_step", lambda *_: Step())
    monkeypatch.setattr(step_timing.time, "process_time", lambda: clock[0])
    config = dataclasses.replace(get_preset("debug"), vocab_size=64)
    found = step_timing.time_step(config, (), device=torch.device("cpu"), micro_batch=4)
    assert ("other programs took 50% of the cores" in found.how) == is_said


def test_the_way_of_the_update_decides_what_it_keeps() -> None:
    config = dataclasses.replace(get_preset("gpt2"), vocab_size=50304)
    mixed = estimate_memory(config, 1, Precision(torch.bfloat16, ""), DEFAULT_KERNELS)
    plain = estimate_memory(config, 1, Precision(torch.float32, ""), DEFAULT_KERNELS)
    assert mixed["activations"] < plain["activations"]
    saving = dataclasses.replace(config, activation_checkpointing=True)
    assert (
        estimate_memory(saving, 1, Precision(torch.float32, ""), DEFAULT_KERNELS)["activations"]
        < plain["activations"]
    )


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from gptforge.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit as leaving: assert leaving.code in (0, None)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max_steps" in done.stdout and "--json" in done.stdout
