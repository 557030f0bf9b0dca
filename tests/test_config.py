import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.config import (
    FIELDS,
    Config,
    merge,
    read_toml,
    resume_conflicts,
    to_toml,
    validate,
)
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
    ],
)
def test_a_wrong_number_is_named_with_its_flag_and_value(
    values: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        validate(merge(Config(), values, source="test"))
    for word in words:
        assert word in str(caught.value)


def test_the_defaults_are_the_seeds() -> None:
    c = Config()
    validate(c)
    shape = (c.block_size, c.n_layer, c.n_head, c.n_embd, c.context_length)
    assert shape == (1024, 12, 12, 768, 1024)
    rates = (c.max_lr, c.min_lr, c.warmup_steps, c.max_steps)
    assert rates == (1e-3, 1e-4, 100, 500)
    assert (c.batch_size, c.gradient_accumulation_steps, c.tokens_per_step) == (32, 4, 131072)


def test_an_unknown_field_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'max_steps'"):
        merge(Config(), {"max_step": 3}, source="x.toml")


@pytest.mark.parametrize("value", ["3", 3.5, True, None, [3]])
def test_a_value_of_the_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="max_steps takes a whole number"):
        merge(Config(), {"max_steps": value}, source="x.toml")


def test_whole_numbers_are_fine_where_fractions_are_meant() -> None:
    assert merge(Config(), {"dropout": 0}, source="x").dropout == 0.0


values = {
    bool: st.booleans(),
    int: st.integers(-(2**40), 2**40),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(exclude_categories=["Cs"])),
}


@given(st.fixed_dictionaries({name: values[kind] for name, kind in FIELDS.items()}))
def test_toml_gives_back_every_field(fields: dict[str, object]) -> None:
    fields |= {"restart": False, "config": ""}
    config = dataclasses.replace(Config(), **fields)  # type: ignore[arg-type]
    written = to_toml(config, {"command": 'python gpt.py --prompt "x"'})
    read = {k: v for k, v in tomllib.loads(written).items() if not isinstance(v, dict)}
    assert merge(Config(), read, source="x") == config


def test_a_broken_toml_file_is_a_users_mistake(tmp_path) -> None:
    (tmp_path / "bad.toml").write_text("max_steps = = 3")
    for path in (tmp_path / "bad.toml", tmp_path / "missing.toml", tmp_path):
        with pytest.raises(UserError, match="--config"):
            read_toml(path)


def test_what_does_not_change_learning_may_differ_on_resume() -> None:
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
    assert resume_conflicts(old, dataclasses.replace(old, max_steps=100))


def test_runs_of_earlier_versions_read_their_files_as_they_did(tmp_path) -> None:
    (tmp_path / "old.toml").write_text('input = "d/t.CSV"\n[made_by]\ngptforge = "0.1"\n')
    values, is_a_runs = read_toml(tmp_path / "old.toml")
    assert (is_a_runs, values["kind"], values["split_by_name"]) == (True, "text", False)
    (tmp_path / "new.toml").write_text(to_toml(Config(input="t.csv"), {}))
    values, _ = read_toml(tmp_path / "new.toml")
    assert (values["kind"], values["split_by_name"]) == ("auto", True)
    (tmp_path / "own.toml").write_text('input = "t.csv"\n')
    assert read_toml(tmp_path / "own.toml") == ({"input": "t.csv"}, False)
