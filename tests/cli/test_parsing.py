import pytest

from gptforge.cli.export import ExportArgs
from gptforge.cli.parsing import flag_values, parse_args, parse_train_args
from gptforge.cli.prepare import PrepareArgs, TokenizerArgs
from gptforge.cli.sample import SampleArgs
from gptforge.errors import UserError


@pytest.mark.parametrize(
    "args", [("--max_steps", "7"), ("--max-steps", "7"), ("--max_steps=7",), ("--max-steps=7",)]
)
def test_hyphens_and_underscores(args) -> None:
    config, explicit = parse_train_args(args)
    assert config.max_steps == 7
    assert explicit == {"max_steps"}


@pytest.mark.parametrize(
    ("args", "shuffle", "restart", "compiled"),
    [
        (("--shuffle", "false"), False, False, "auto"),
        (("--shuffle=false", "--restart"), False, True, "auto"),
        (("--restart", "--compile", "--shuffle", "true"), True, True, "true"),
        (("--restart", "false", "--compile=false"), True, False, "false"),
    ],
)
def test_booleans_take_a_value_or_stand_alone(args, shuffle, restart, compiled) -> None:
    config, _ = parse_train_args(args)
    assert (config.shuffle, config.restart, config.compile) == (shuffle, restart, compiled)


def test_flags_override_the_file_and_the_file_overrides_the_preset(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("max_steps = 11\nn_layer = 3\ncompile = false\n")
    args = ["--preset", "debug", "--config", str(tmp_path / "c.toml"), "--max_steps", "5"]
    config, explicit = parse_train_args(args)
    assert (config.max_steps, config.n_layer, config.n_embd, config.n_head) == (5, 3, 32, 2)
    assert config.compile == "false"
    assert {"n_layer", "max_steps", "preset", "config", "compile"} == explicit


OLD_FLAGS = ("--stagger", "--keep=3", "--headerless", "true", "--overwrite")


def test_old_spellings_are_hidden_aliases(capsys) -> None:
    config, explicit = parse_train_args(OLD_FLAGS)
    assert (config.random_offset, config.keep_checkpoints) == (True, 3)
    assert (config.raw_bin, config.restart) == (True, True)
    assert explicit == {"random_offset", "keep_checkpoints", "raw_bin", "restart"}
    args = parse_args(PrepareArgs, ["text", "--out", "o", "--headerless", "--overwrite"], "p")
    assert (args.raw_bin, args.restart) == (True, True)
    args = parse_args(PrepareArgs, ["--restart", "False", "text", "--out", "o"], "p")
    assert (args.sources, args.restart) == (("text",), False)
    # A command that has the old name itself keeps it.
    assert parse_args(TokenizerArgs, ["text", "--out", "o", "--overwrite"], "t").overwrite
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    shown = capsys.readouterr().out
    assert "--keep_checkpoints" in shown
    for old in ("--stagger", "--keep ", "--headerless", "--overwrite"):
        assert old not in shown


def test_a_tilde_after_an_equals_sign_is_the_home_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config, _ = parse_train_args(["--out_dir=~/run", "--input", "~text"])
    assert (config.out_dir, config.input) == ((tmp_path / "run").as_posix(), "~text")
    args = ["--prompt=~/a", "run"]
    assert parse_args(SampleArgs, args, "gptforge sample").prompt == "~/a"


def test_old_spellings_in_files(tmp_path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("stagger = true\nkeep = 3\nheaderless = true\n")
    config, explicit = parse_train_args(["--config", str(path)])
    assert (config.random_offset, config.keep_checkpoints, config.raw_bin) == (True, 3, True)
    assert explicit == {"config", "random_offset", "keep_checkpoints", "raw_bin"}
    path.write_text("overwrite = true\n")
    with pytest.raises(UserError, match="restart can only be set by a flag"):
        parse_train_args(["--config", str(path)])


def test_a_byte_order_mark_is_ignored(tmp_path) -> None:
    (tmp_path / "c.toml").write_text("max_steps = 11\n", encoding="utf-8-sig")
    config, _ = parse_train_args(["--config", str(tmp_path / "c.toml")])
    assert config.max_steps == 11


def test_fields_of_a_runs_own_file_are_not_explicit(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('max_steps = 11\n[made_by]\ncommand = "x"\n')
    config, explicit = parse_train_args(["--config", str(tmp_path / "c.toml"), "--n_layer", "1"])
    assert config.max_steps == 11
    assert explicit == {"config", "n_layer"}


def test_removed_fields_in_a_runs_own_file_are_ignored(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('attention = "auto"\nmax_steps = 11\n[made_by]\nx = "y"\n')
    assert parse_train_args(["--config", str(tmp_path / "c.toml")])[0].max_steps == 11


@pytest.mark.parametrize(
    "text", ["[model]\nn_layer = 3", "restart = true", "n_layers = 3", "attention = 1"]
)
def test_invalid_fields_in_a_file_are_errors(tmp_path, text) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=r"c\.toml"):
        parse_train_args(["--config", str(tmp_path / "c.toml")])


def test_a_file_may_name_the_preset(tmp_path) -> None:
    (tmp_path / "c.toml").write_text('preset = "gpt2-medium"\n')
    assert parse_train_args(["--config", str(tmp_path / "c.toml")])[0].n_embd == 1024


def test_flag_values() -> None:
    assert flag_values(["--out_dir", "x", "--max-lr=1e-3"]) == {"out_dir": "x", "max_lr": "1e-3"}


@pytest.mark.parametrize("name", ["shuffle", "restart", "compile", "deterministic", "true"])
def test_a_value_may_be_named_like_a_switch(name) -> None:
    config, _ = parse_train_args(["--out_dir", name, "--seed", "3"])
    assert (config.out_dir, config.seed, config.restart) == (name, 3, False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max_steps", "1e3"), "--max_steps must be a whole number, not '1e3' "),
        (("--shuffle", "maybe"), "--shuffle must be true or false, not maybe "),
        (("--optimizer", "sgd"), "--optimizer must be one of adamw, muon, not sgd "),
        (("--max_stepz", "-3"), "Unrecognized options: --max_stepz; did you mean --max_steps? "),
        (("--lr=1", "--foo", "a-b", "c"), "Unrecognized options: --lr, --foo; did you mean "),
        (("--max-stepz", "3", "--foo"), "Unrecognized options: --max-stepz, --foo; did you mean "),
        (("--seed", "3", "a.txt"), "Unrecognized options: a.txt (see "),
    ],
)
def test_a_wrong_value_is_named_with_its_flag(args, message) -> None:
    with pytest.raises(UserError) as refused:
        parse_train_args(args)
    assert str(refused.value).startswith(message)


def test_the_empty_default_is_not_one_of_the_choices() -> None:
    args = ["run", "out", "--to", "gguf", "--type", "q4"]
    with pytest.raises(UserError, match="--type must be one of f32, f16, q8_0, not q4 "):
        parse_args(ExportArgs, args, "gptforge export")
