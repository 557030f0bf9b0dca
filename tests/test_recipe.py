"""The rule behind `--preset auto`: valid for any text, monotone in its size, and flags win."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptforge import recipe
from gptforge.builders.step_timing import fit_steps
from gptforge.builders.teachers import cost_with_teachers
from gptforge.builders.text_presets import explain_recipe
from gptforge.config import Config, merge
from gptforge.config_checks import validate
from gptforge.estimate.formulas import flops_per_token
from gptforge.presets import get_preset
from gptforge.recipe import (
    ANCHORS,
    MAX_PRESET_MEGABYTES,
    MIN_STEPS_SHARE,
    RECIPE_FIELDS,
    USABLE_TIME,
    make_recipe,
)

AUTO = get_preset("auto")
sizes = st.floats(3, 10).map(lambda exponent: int(10**exponent))
devices = st.sampled_from(["gpu", "cpu"])
limits = st.one_of(st.just(0.0), st.floats(0.01, 10_000))
rates = st.floats(9, 17).map(lambda exponent: 10**exponent)
explicit_flags = st.fixed_dictionaries(
    {},
    optional={
        "n_layer": st.integers(1, 50),
        "n_head": st.integers(1, 30),
        "n_embd": st.integers(1, 2000),
        "batch_size": st.integers(1, 300),
        "gradient_accumulation_steps": st.integers(1, 20),
        "context_length": st.integers(1, 4096),
        "max_steps": st.integers(1, 10**6),
        "max_lr": st.floats(1e-8, 1),
        "dropout": st.floats(0, 0.9),
        "weight_decay": st.floats(0, 20),
        "tokenizer": st.sampled_from(["char", "byte", "bpe", "gpt2", "my.json"]),
        "eval_every": st.integers(1, 10**6),
        "seed": st.integers(0, 10),
    },
)


def configure(num_bytes: int, device: str, **options) -> Config:
    recipe = make_recipe(num_bytes, device, **options)
    assert set(recipe.values) <= RECIPE_FIELDS
    explicit = options.get("explicit", {})
    assert not set(recipe.values) & set(explicit)
    return merge(AUTO, {**recipe.values, **explicit}, source="test")


@pytest.fixture(autouse=True, scope="module")
def cached_anchors() -> Iterator[None]:
    """A rule with a time limit looks at hundreds of sizes, the same ones for each text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "_interpolate", functools.cache(recipe._interpolate))
        yield


@settings(max_examples=300)
@given(sizes, devices, limits, rates, explicit_flags)
def test_any_text_gets_a_valid_configuration(num_bytes, device, limit, rate, explicit) -> None:
    if explicit.keys() >= {"n_embd", "n_head"}:
        explicit["n_embd"] = explicit["n_head"] * 8
    config = configure(
        num_bytes,
        device,
        time_limit=limit,
        flops_per_second=rate,
        explicit=explicit,
    )
    validate(config)
    assert {name: getattr(config, name) for name in explicit} == explicit


@settings(max_examples=300)
@given(sizes, sizes, devices, limits, rates)
def test_more_text_means_no_smaller_model_and_no_more_regularization(
    one, other, device, limit, rate
) -> None:
    smaller, larger = (
        configure(size, device, time_limit=limit, flops_per_second=rate)
        for size in sorted((one, other))
    )
    for name in ("n_layer", "n_embd", "context_length", "tokens_per_step", "max_steps"):
        assert getattr(smaller, name) <= getattr(larger, name), name
    for name in ("weight_decay", "muon_weight_decay", "dropout", "token_noise", "max_lr"):
        assert getattr(smaller, name) >= getattr(larger, name), name
    order = ["char", "bpe", "gpt2"]
    assert order.index(smaller.tokenizer) <= order.index(larger.tokenizer)


@pytest.mark.parametrize(("max_steps", "eval_every"), [(20, 20), (100, 20), (300, 20), (600, 50)])
def test_few_steps_are_not_outweighed_by_evaluations(max_steps, eval_every) -> None:
    config = configure(10**6, "cpu", explicit={"max_steps": max_steps})
    assert config.eval_every == eval_every
    assert configure(10**5, "cpu", explicit={"max_steps": max_steps}).eval_every <= eval_every


@pytest.mark.parametrize("device", ANCHORS)
def test_anchors_are_what_their_text_gets(device) -> None:
    for anchor in ANCHORS[device]:
        config = configure(round(anchor.megabytes * 1e6), device)
        expected = dataclasses.asdict(anchor)
        sequences = expected.pop("sequences")
        assert expected.pop("megabytes") == anchor.megabytes
        assert {name: getattr(config, name) for name in expected} == expected
        assert config.global_batch_size == sequences


@pytest.mark.parametrize(
    "explicit, optimizer",
    [({}, "muon"), ({"parallel": "fsdp"}, "adamw"), ({"parallel": "ddp"}, "muon")],
)
def test_sharded_models_get_adamw(explicit, optimizer) -> None:
    assert configure(10**8, "gpu", explicit=explicit).optimizer == optimizer


def test_docs_have_the_anchors() -> None:
    docs = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
    docs = docs.partition("## What was measured")[0]
    for a in (anchor for anchors in ANCHORS.values() for anchor in anchors):
        row = (
            f"| {a.megabytes:g} | {a.tokenizer} | {a.n_layer} x {a.n_embd} | {a.context_length} | "
            f"{a.sequences} | {a.max_steps:,} | {a.max_lr:g} | {a.muon_lr:g} | "
            f"{a.weight_decay:g} | {a.muon_weight_decay:g} | {a.dropout:g} | {a.token_noise:g} | "
            f"{a.teachers} |"
        )
        assert f"{row}\n" in docs, f"put this row into the table: {row}"
    rows = [line for line in docs.splitlines() if line.startswith("| ") and " x " in line]
    assert len(rows) == sum(map(len, ANCHORS.values())) + len(ANCHORS)


@settings(max_examples=100)
@given(sizes, devices, st.floats(0.1, 1000), rates)
@example(3162277, "gpu", 122.0, 1e12)  # a slightly larger text has no teachers, and costs less
def test_time_limit_leaves_about_half_of_the_steps(num_bytes, device, limit, rate) -> None:
    config = configure(num_bytes, device, time_limit=limit, flops_per_second=rate)
    # Regularization depends on the text alone.
    unlimited = configure(num_bytes, device)
    assert (config.dropout, config.weight_decay) == (unlimited.dropout, unlimited.weight_decay)
    smallest = configure(1000, device)
    if config.n_layer * config.n_embd <= smallest.n_layer * smallest.n_embd:
        return  # nothing smaller is left
    # With fewer ids than any tokenizer has, which the rule does not know yet.
    model = dataclasses.replace(config.model, vocab_size=128)
    flops = (
        config.max_steps * config.tokens_per_step * flops_per_token(model, config.context_length)
    ) * cost_with_teachers(config)
    assert flops * MIN_STEPS_SHARE <= 1.05 * limit * 60 * USABLE_TIME * rate


def test_parts_of_a_global_batch_follow_its_flags() -> None:
    base = configure(10**6, "gpu")
    for flags in ({"batch_size": 16}, {"gradient_accumulation_steps": 4}):
        config = configure(10**6, "gpu", explicit=flags)
        assert config.global_batch_size == base.global_batch_size == 64


def test_sequences_are_short_and_few_in_a_tiny_text() -> None:
    config = configure(2000, "gpu")
    assert config.context_length * 16 <= 2000
    assert config.tokens_per_step * 2 <= 2000


def test_reasons_name_choices_and_explicit_flags() -> None:
    explicit = {"n_layer": 3, "seed": 4}
    recipe = make_recipe(10**6, "gpu", explicit=explicit)
    text = "\n".join(explain_recipe(recipe, explicit, explicit))
    assert "3 layers x 384" in text and "keep the model from memorizing" in text
    assert "explicit: n_layer 3" in text and "seed" not in text
    short = make_recipe(10**8, "gpu", time_limit=1, flops_per_second=1e12)
    text = "\n".join(explain_recipe(short, {}, (), time_limit=1))
    assert "as large as --time_limit 1 allows" in text
    # No reason for what the user chose, and what a model or shards fix is not the user's choice.
    fixed = {"n_layer": 3, "dropout": 0.0}
    text = "\n".join(explain_recipe(make_recipe(10**4, "gpu", explicit=fixed), fixed, ["dropout"]))
    assert "memorize" not in text and text.endswith("explicit: dropout 0.0")


@settings(max_examples=200)
@given(
    st.floats(0.1, 1e5),
    st.floats(1e-4, 10),
    st.integers(0, 10**7),
    st.sampled_from([set(), {"warmup_steps"}, {"eval_every"}]),
)
def test_fitted_schedule_ends_in_time(seconds, seconds_per_step, val_tokens, explicit) -> None:
    config = configure(10**6, "gpu")
    eval_seconds = seconds_per_step * val_tokens / config.tokens_per_step / 3
    fitted = fit_steps(
        config,
        explicit,
        seconds=seconds,
        seconds_per_step=seconds_per_step,
        seconds_per_eval=eval_seconds,
    )
    validate(fitted)
    assert {name: getattr(fitted, name) for name in explicit} == {
        name: getattr(config, name) for name in explicit
    }
    assert fitted.max_steps <= config.max_steps
    evaluations = -(-fitted.max_steps // fitted.eval_every)
    total = fitted.max_steps * seconds_per_step + evaluations * eval_seconds
    minimum = config.warmup_steps if "warmup_steps" in explicit else 1
    if "eval_every" not in explicit:
        assert evaluations * eval_seconds <= max(total / 3, eval_seconds)
    assert total <= seconds or fitted.max_steps == minimum


def test_longer_limit_never_makes_fewer_steps() -> None:
    config = configure(10**6, "gpu")
    steps = [
        fit_steps(
            config, (), seconds=seconds, seconds_per_step=0.01, seconds_per_eval=0.02
        ).max_steps
        for seconds in range(1, 60)
    ]
    assert steps == sorted(steps)
    assert steps[-1] == config.max_steps


def test_presets_stop_growing_at_their_largest_text() -> None:
    largest = make_recipe(10**6 * MAX_PRESET_MEGABYTES, "gpu", preset="shakespeare").values
    assert make_recipe(10**9, "gpu", preset="shakespeare").values["n_embd"] == largest["n_embd"]
    assert make_recipe(10**9, "gpu").values["n_embd"] > largest["n_embd"]
