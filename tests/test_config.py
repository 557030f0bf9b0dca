import dataclasses
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.config import FIELDS, Config, merge, resume_conflicts
from gptforge.config_checks import validate
from gptforge.config_file import read_toml, to_toml
from gptforge.errors import UserError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"n_embd": 100, "n_head": 12}, ["--n_embd 100", "--n_head 12"]),
        ({"warmup_steps": 600}, ["--warmup_steps 600", "--max_steps 500"]),
        ({"context_length": 2048}, ["--context_length 2048", "--block_size 1024"]),
        ({"max_steps": 0}, ["--max_steps", "0"]),
        ({"batch_size": -1}, ["--batch_size", "-1"]),
        ({"gradient_accumulation_steps": 0}, ["--gradient_accumulation_steps"]),
        ({"val_fraction": 1.0}, ["--val_fraction", "1.0"]),
        ({"dropout": -0.1}, ["--dropout", "-0.1"]),
        ({"dropout_ramp": 1.5}, ["--dropout_ramp", "1.5"]),
        ({"max_lr": 0.0}, ["--max_lr"]),
        ({"max_lr": float("nan")}, ["--max_lr", "nan"]),
        ({"min_lr": 0.1}, ["--min_lr 0.1", "--max_lr 0.001"]),
        ({"vocab_size": -5}, ["--vocab_size", "-5"]),
        ({"mlp_ratio": 0}, ["--mlp_ratio"]),
        ({"log_every": 0}, ["--log_every"]),
        ({"time_limit": -1.0}, ["--time_limit"]),
        ({"dtype": "float8"}, ["--dtype float8", "bfloat16"]),
        ({"optimizer": "sgd"}, ["--optimizer sgd", "adamw"]),
        ({"seed": -1}, ["--seed"]),
        ({"tracker": "wandb,neptune"}, ["--tracker wandb,neptune", "tensorboard"]),
        ({"tracker": "wandb, wandb"}, ["--tracker", "once"]),
    ],
)
def test_invalid_values_are_named_with_their_flag(
    values: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        validate(merge(Config(), values, source="test"))
    for word in words:
        assert word in str(caught.value)


def test_defaults_are_gpt2_small() -> None:
    c = Config()
    validate(c)
    shape = (c.block_size, c.n_layer, c.n_head, c.n_embd, c.context_length)
    assert shape == (1024, 12, 12, 768, 1024)
    rates = (c.max_lr, c.min_lr, c.warmup_steps, c.max_steps)
    assert rates == (1e-3, 1e-4, 100, 500)
    assert (c.batch_size, c.gradient_accumulation_steps, c.tokens_per_step) == (32, 4, 131072)


def test_a_constant_rate_may_be_below_the_default_of_min_lr() -> None:
    validate(merge(Config(), {"schedule": "constant", "max_lr": 1e-5}, source="test"))


def test_an_unknown_field_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'max_steps'"):
        merge(Config(), {"max_step": 3}, source="x.toml")


@pytest.mark.parametrize("value", ["3", 3.5, True, None, [3]])
def test_a_value_of_the_wrong_type_is_an_error(value: object) -> None:
    with pytest.raises(UserError, match="max_steps takes a whole number"):
        merge(Config(), {"max_steps": value}, source="x.toml")


def test_integers_are_accepted_for_floats() -> None:
    assert merge(Config(), {"dropout": 0}, source="x").dropout == 0.0


values = {
    bool: st.booleans(),
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(exclude_categories=["Cs"])),
}


@given(st.fixed_dictionaries({name: values[kind] for name, kind in FIELDS.items()}))
def test_toml_round_trip(fields: dict[str, object]) -> None:
    fields |= {"restart": False, "config": ""}
    config = dataclasses.replace(Config(), **fields)  # type: ignore[arg-type]
    written = to_toml(config, {"command": 'python gpt.py --prompt "x"'})
    read = {k: v for k, v in tomllib.loads(written).items() if not isinstance(v, dict)}
    assert merge(Config(), read, source="x") == config


def test_an_invalid_toml_file_is_a_user_error(tmp_path) -> None:
    (tmp_path / "bad.toml").write_text("max_steps = = 3")
    for path in (tmp_path / "bad.toml", tmp_path / "missing.toml", tmp_path):
        with pytest.raises(UserError, match="--config"):
            read_toml(path, flag="--config")
        with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: "):  # of a run
            read_toml(path)


def test_resume_conflicts() -> None:
    old = Config()
    new = dataclasses.replace(
        old,
        batch_size=8,
        gradient_accumulation_steps=16,
        device="cuda",
        max_steps=900,
        save_every=7,
    )
    assert resume_conflicts(old, new) == []
    assert "n_layer: 12 -> 6" in resume_conflicts(old, dataclasses.replace(old, n_layer=6))
    assert resume_conflicts(old, dataclasses.replace(old, batch_size=16))


def test_config_of_a_version_0_1_run(tmp_path) -> None:
    (tmp_path / "old.toml").write_text(
        'input = "d/t.CSV"\nproducts = "auto"\nstagger = true\nkeep = 2\nheaderless = true\n'
        '[made_by]\ngptforge = "0.1"\n'
    )
    values, made_by = read_toml(tmp_path / "old.toml")
    assert made_by is not None
    config = merge(Config(), values, source="old.toml")
    assert (config.kind, config.split_by_name) == ("text", False)
    assert (config.random_offset, config.keep_checkpoints, config.raw_bin) == (True, 2, True)
    (tmp_path / "new.toml").write_text(to_toml(Config(input="t.csv"), {}))
    values, _ = read_toml(tmp_path / "new.toml")
    assert (values["kind"], values["split_by_name"]) == ("auto", True)
    (tmp_path / "user.toml").write_text('input = "t.csv"\n')
    assert read_toml(tmp_path / "user.toml") == ({"input": "t.csv"}, None)
