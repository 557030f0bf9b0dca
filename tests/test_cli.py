"""The program as a person meets it: flags, errors, exits, and the files it leaves."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest

from gptforge import cli
from gptforge.builders import memory_fit
from gptforge.cli.flags import flag_values, parse_train_args
from gptforge.errors import UserError
from tests.programs import DEBUG, events, start


@pytest.mark.parametrize(
    "args",
    [
        ("--max_steps", "7"),
        ("--max-steps", "7"),
        ("--max_steps=7",),
        ("--max-steps=7",),
    ],
)
def test_flags_in_every_spelling(args) -> None:
    config, given = parse_train_args(args)
    assert config.max_steps == 7
    assert given == {"max_steps"}


@pytest.mark.parametrize(
    ("args", "shuffle", "overwrite", "compiled"),
    [
        (("--shuffle", "false"), False, False, "auto"),
        (("--shuffle=false", "--overwrite"), False, True, "auto"),
        (("--overwrite", "--compile", "--shuffle", "true"), True, True, "true"),
        (("--overwrite", "false", "--compile=false"), True, False, "false"),
    ],
)
def test_booleans_take_true_or_false_and_stand_alone_for_true(
    args, shuffle, overwrite, compiled
) -> None:
    config, _ = parse_train_args(args)
    assert (config.shuffle, config.restart, config.compile) == (shuffle, overwrite, compiled)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("max_steps = 11\nn_layer = 3\ncompile = false\n")
    args = ["--preset", "debug", "--config", str(tmp_path / "c.toml"), "--max_steps", "5"]
    config, given = parse_train_args(args)
    assert (config.max_steps, config.n_layer, config.n_embd, config.n_head) == (5, 3, 32, 2)
    assert config.compile == "false"
    assert {"n_layer", "max_steps", "preset", "config", "compile"} == given


def test_the_help_of_doctor_shows_that_it_needs_no_path(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    assert "[OPTIONS] [PATH]" in capsys.readouterr().out


def test_a_byte_order_mark_in_front_of_the_file_does_no_harm(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("max_steps = 11\n", encoding="utf-8-sig")
    config, _ = parse_train_args(["--config", str(tmp_path / "c.toml")])
    assert config.max_steps == 11


def test_what_a_runs_own_file_says_was_not_set_by_hand(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('max_steps = 11\n[made_by]\ncommand = "x"\n')
    config, given = parse_train_args(["--config", str(tmp_path / "c.toml"), "--n_layer", "1"])
    assert config.max_steps == 11
    assert given == {"config", "n_layer"}


def test_a_field_that_is_gone_does_not_keep_an_earlier_run_from_going_on(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('attention = "auto"\nmax_steps = 11\n[made_by]\nx = "y"\n')
    assert parse_train_args(["--config", str(tmp_path / "c.toml")])[0].max_steps == 11


@pytest.mark.parametrize(
    "text", ["[model]\nn_layer = 3", "overwrite = true", "n_layers = 3", "attention = 1"]
)
def test_nothing_in_a_file_is_passed_over_in_silence(tmp_path, text) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=r"c\.toml"):
        parse_train_args(["--config", str(tmp_path / "c.toml")])


def test_a_file_may_name_the_preset(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('preset = "gpt2-medium"\n')
    assert parse_train_args(["--config", str(tmp_path / "c.toml")])[0].n_embd == 1024


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--max_stps", "3"), "did you mean --max_steps?"),
        (("--max_steps", "many"), "--max_steps: give a whole number, not many"),
        (("--max_lr", "high"), "--max_lr: give a number, not high"),
        (("bench", "--turns", "1.5"), "give a whole number, not 1.5 (see gptforge bench --help)"),
        (("--max_steps",), "--max_steps"),
        (("--shuffle", "maybe"), "give true or false"),
        (("--dtype", "int8"), "--dtype"),
        (("--preset", "gpt5"), "gpt2-medium"),
        (("--config", "missing.toml"), "no such file"),
        (("--n_embd", "100", "--n_head", "12"), "--n_embd 100"),
        (("--warmup_steps", "600"), "--warmup_steps 600"),
        (("--input", "missing.txt"), "missing.txt"),
        (("--device", "tpu"), "--device tpu"),
        (("--vocab_size", "10"), "--vocab_size 10"),
        (("--context_length", "9999", "--block_size", "9999"), "--context_length 9999"),
        (("--init_from", "nowhere"), "nowhere"),
        (("--tokenizer", "bert"), "--tokenizer bert"),
        (("trian",), "did you mean 'train'?"),
        (("sample",), "RUN"),
        (("sample", "nowhere"), "nowhere"),
        (("eval", "nowhere"), "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(program, play, args, words) -> None:
    small = ("--input", play, "--preset", "debug", "--device", "cpu")
    done = program(*(small if args[0].startswith("--") else ()), *args)
    assert done.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    assert words in done.err


def test_debugging_shows_the_traceback(program, monkeypatch) -> None:
    monkeypatch.setenv("GPTFORGE_DEBUG", "1")
    with pytest.raises(UserError):
        program("--max_stps", "3")


def test_a_full_disk_is_one_line_with_the_file_and_what_to_do(program, monkeypatch) -> None:
    def full(args) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/index.json")

    monkeypatch.setitem(cli.COMMANDS, "prepare", full)
    done = program("prepare")
    assert done.code == 1
    assert done.err == (
        "error: out/index.json: the disk is full: make room, then give the same command again\n"
    )


def test_help_shows_every_field_and_every_command(capsys) -> None:
    from gptforge.cli import ABOUT, COMMANDS, main
    from gptforge.config import FIELDS

    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code in (0, None)
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert f"--{name}" in shown
    assert ABOUT.keys() == COMMANDS.keys()
    for name, about in ABOUT.items():
        assert re.search(rf"{name} +{re.escape(about)}", shown)


@pytest.mark.parametrize(
    ("env", "command"),
    [
        ({}, "python gpt.py"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node=2 gpt.py"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "torchrun ... --nproc_per_node=2 gpt.py"),
    ],
)
def test_to_go_on_it_names_the_launcher_it_was_started_by(monkeypatch, env, command) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    assert cli._launcher(env) == command


def test_other_commands_take_one_process_of_several(program, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    words = ("plan", "--preset", "debug", "--device", "cpu")
    # Others than torchrun name ranks as well.
    assert program(*words).out != ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = program(*words)
    assert (done.code, done.out) == (0, "")


def test_without_a_preset_it_says_which_and_why(program, play) -> None:
    done = program("--device", "cpu", "--input", play, "--max_steps", 2, "--eval_tokens", 200)
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert "shakespeare-cpu" in first
    assert "because" in first
    assert "--preset" in first
    assert any("warmup" in line and "cut to 1" in line for line in rest)
    assert any("this will take about" in line for line in rest)
    assert Path("runs/shakespeare-cpu/checkpoints/step-000002").is_dir()


def test_a_run_leaves_the_files_of_the_contract(program, play) -> None:
    done = program(*DEBUG, "--input", play, "--out_dir", "run")
    assert done.code == 0, done.err
    assert done.err == ""
    for name in ("config.toml", "log.md", "metrics.jsonl", "training_curves.png", "samples.md"):
        assert (Path("run") / name).stat().st_size > 0, name
    lines = re.findall(
        r"^step \d+ \| loss: \d+\.\d{4} \| dt: \d+\.\d{2}ms \| tok/sec: \d+\.\d{2} \| "
        r"norm: \d+\.\d{2} \| lr: \d\.\d{6}$",
        done.out,
        re.MULTILINE,
    )
    assert len(lines) == 20
    log = Path("run/log.md").read_text(encoding="utf-8")
    assert all(line in log for line in lines)
    assert "Total Parameters:" in log
    assert "\x1b" not in done.out + log
    kinds = [event["event"] for event in events()]
    assert set(kinds) == {"start", "train", "eval", "save", "end"}
    assert "Best held-out loss" in log

    # The configuration it wrote starts the same run again: finished; also after --overwrite.
    assert program(*DEBUG, "--input", play, "--out_dir", "run", "--overwrite=true").code == 0
    again = program("--config", "run/config.toml")
    assert again.code == 0
    assert "is finished" in again.out


def test_sampling_prints_prompt_and_continuation_and_nothing_else(program, play) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run")
    ask = ("sample", "run", "--prompt", "ROMEO:", "--max_new_tokens", 40, "--device", "cpu")
    done = program(*ask)
    assert done.code == 0
    # 46 characters, 32 positions.
    assert re.fullmatch(r"note: longer than the model's 32 tokens of context[^\n]*\n", done.err)
    assert done.out.startswith("ROMEO:")
    assert len(done.out) == len("ROMEO:") + 40 + 1
    assert program(*ask).out == done.out
    assert program(*ask, "--seed", 5).out != done.out
    assert program(*ask, "--num_samples", 3).out.count("\n---\n") == 2
    assert program("sample", "run/checkpoints/step-000010", "--device", "cpu").code == 0
    unknown = program(*ask[:2], "--prompt", "日")
    assert unknown.code == 2
    assert "'日'" in unknown.err


def test_judging_a_run_gives_one_json_object(program, play) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run", "--eval_tokens", 0)
    done = program("eval", "run", "--json", "--device", "cpu")
    score = json.loads(done.out)
    judged = [event for event in events() if event["event"] == "eval"]
    best = min(judged, key=lambda event: event["val_loss"])
    assert score["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(best["val_bpb"], rel=1e-5)
    held_out = play.read_text()[int(len(play.read_text()) * 0.9) :]
    assert score["tokens"] == len(held_out) - 1
    own = program("eval", "run", "--data", play, "--device", "cpu")
    assert own.code == 0
    assert own.out.startswith(f"loss on {play}")
    assert "is what run learned from" in own.err
    play.write_text(play.read_text() + "More.")
    changed = program("eval", "run", "--device", "cpu")
    assert changed.code == 2
    assert "has changed" in changed.err


def test_the_library_loads_a_run(program, play) -> None:
    import gptforge

    program(*DEBUG, "--input", play, "--out_dir", "run")
    writer = gptforge.load("run", device="cpu")
    text = writer.generate("JULIET", max_new_tokens=12, temperature=0.5, top_k=5, seed=3)
    assert "".join(writer.stream("JULIET", 12, temperature=0.5, top_k=5, seed=3)) == text
    assert writer.decode(writer.encode("JULIET")) == "JULIET"
    assert writer.logits(writer.encode("JULIET")).shape == (6, writer.tokenizer.vocab_size)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links to begin with")
def test_a_run_without_links_is_found_by_its_pointer_files(program, play) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run")
    for which in ("best", "last"):
        pointer = Path("run/checkpoints") / which
        name = pointer.readlink().name
        pointer.unlink()
        pointer.write_text(f"{name}\n")
        done = program("sample", pointer, "--max_new_tokens", 3, "--device", "cpu")
        assert done.code == 0, done.err


def test_two_processes_do_not_train_into_one_folder(tmp_path, play, program) -> None:
    command = (*DEBUG, "--input", play, "--out_dir", tmp_path / "run", "--max_steps", 10**6)
    process = start(*command, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3 "):
            break
    second = program(*command)
    process.kill()
    process.wait(timeout=60)
    process.stdout.close()
    assert second.code == 2
    assert "another process" in second.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--out_dir", ".", "--overwrite"), "--out_dir ."),
        (("--out_dir", "file/run"), "--out_dir file/run cannot be: file is a file"),
        (("--batch_size", 10**12), "--batch_size 1000000000000"),
        (("--out_dir", "caf\udce9"), "UTF-8"),
    ],
)
def test_odd_folders_and_sizes_are_named(program, play, args, words) -> None:
    Path("file").write_text("in the way")
    done = program(*DEBUG, "--input", play, *args)
    assert done.code in (1, 2)
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    assert words in done.err


@pytest.mark.parametrize("args", [("--seed", 10**30), ("--temperature", -1), ("--prompt", "日")])
def test_a_wrong_sample_prints_nothing_but_the_mistake(program, play, args) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run")
    done = program("sample", "run", "--device", "cpu", *args)
    assert (done.code, done.out) == (2, "")


def test_values_of_flags_are_not_taken_for_flags() -> None:
    assert flag_values(["--out_dir", "x", "--max-lr=1e-3"]) == {"out_dir": "x", "max_lr": "1e-3"}


@pytest.mark.parametrize("name", ["shuffle", "overwrite", "compile", "deterministic", "true"])
def test_a_value_may_be_called_as_a_switch_is(name) -> None:
    config, _ = parse_train_args(["--out_dir", name, "--seed", "3"])
    assert (config.out_dir, config.seed, config.restart) == (name, 3, False)


def test_a_run_on_the_text_that_comes_along_is_judged_from_any_folder(
    program, monkeypatch, tmp_path
) -> None:
    Path("input.txt").write_bytes((Path(__file__).parents[1] / "input.txt").read_bytes())
    few = ("--eval_tokens", 300, "--max_steps", 2)
    assert program(*DEBUG, *few, "--out_dir", "run").code == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert program("eval", "../run", "--device", "cpu").code == 0


def test_a_model_without_a_run_says_that_it_held_nothing_back(program, play) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run")
    (Path("run/checkpoints/last").resolve() / "state.json").unlink()
    done = program("eval", "run/checkpoints/last", "--device", "cpu")
    assert done.code == 2
    assert "give one with --data" in done.err


def test_a_damaged_checkpoint_points_to_one_that_is_whole(program, play) -> None:
    program(*DEBUG, "--input", play, "--out_dir", "run")
    best = Path("run/checkpoints/best").resolve()
    whole = next(path for path in sorted(best.parent.glob("step-*")) if path != best)
    (best / "model.safetensors").write_bytes(b"")
    done = program("sample", "run", "--device", "cpu")
    assert done.code == 2
    assert done.err.rstrip().endswith(f"{whole.name} is whole")


def test_memory_that_a_cpu_has_not_is_missed_before_anything_is_built(
    program, play, monkeypatch
) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda device: 10**9)
    command = (*DEBUG, "--input", play, "--out_dir", "run", "--batch_size")
    done = program(*command, 10**6)
    assert done.code == 2
    assert re.search(r"--batch_size 1000000 takes at least [\d.]+ GB of memory, and 1.0", done.err)
    assert not Path("run/log.md").exists()
    assert program(*command, 8).code == 0
    monkeypatch.setattr(memory_fit, "usable_memory", lambda device: 10**4)
    done = program(*DEBUG, "--input", play, "--out_dir", "two")
    assert done.code == 2
    assert "even with one window at a time" in done.err


def test_a_text_given_as_a_command_is_pointed_to_its_flag(program, play) -> None:
    done = program(play)
    assert done.code == 2
    assert f"--input {play}" in done.err


def test_several_processes_are_refused_for_now(program, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = program("--preset", "debug")
    assert done.code == 2
    assert "torchrun" in done.err


def test_threads_that_wait_do_not_keep_the_cores_for_long(monkeypatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    cli.limit_openmp_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == cli.GOMP_SPINCOUNT
    # Whoever chose otherwise knows why.
    for name, value in (("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")):
        monkeypatch.delenv("GOMP_SPINCOUNT")
        monkeypatch.setenv(name, value)
        cli.limit_openmp_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == (value if name == "GOMP_SPINCOUNT" else None)
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
