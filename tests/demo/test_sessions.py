"""Rendering and limits of the page, without a browser."""

import re
from math import log

import pytest

from gptforge.builders.load_model import load
from gptforge.demo.sessions import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARS,
    ModelCache,
    generate_with_limits,
)
from gptforge.demo.token_html import PROBABILITY_BINS, render_status, render_tokens
from gptforge.demo.training_tab import training_tab
from gptforge.errors import UserError
from gptforge.files import json_line
from gptforge.inference.language_model import Token
from gptforge.inference.sampling import SamplingParams
from tests.convert.conftest import run as run
from tests.convert.conftest import trained_run as trained_run


@pytest.fixture
def model(run):
    return load(run, device="cpu")


def generate(model, prompt="ROMEO:", tokens=20, **more):
    return list(
        generate_with_limits(
            model, prompt, max_new_tokens=tokens, params=SamplingParams(), seed=1, **more
        )
    )


def test_generated_text_is_escaped() -> None:
    token = Token(0, '<img src=x onerror="alert(1)">', log(0.5), (('"><b>', log(0.5)),))
    page = render_tokens("<script>alert(2)</script>", [token], is_generating=False)
    assert "<img" not in page
    assert "<script" not in page
    assert '"><b>' not in page
    assert "<script" not in render_status("<script>")


@pytest.mark.parametrize("probability", [0.001, 0.05, 0.2, 0.5, 0.7, 0.9, 1.0])
def test_the_tint_shows_the_probability(probability) -> None:
    page = render_tokens(
        "", [Token(0, "a", log(probability), (("b", log(probability)),))], is_generating=False
    )
    assert f'class="t s{sum(probability >= bound for bound in PROBABILITY_BINS)}"' in page
    assert f"probability {probability:.1%}" in page


def test_the_page_has_the_generated_text(model) -> None:
    *_, last = generate(model)
    page = render_tokens("ROMEO:", last.tokens, is_generating=False)
    plain = re.sub(r"<b class=\"line\">↵</b>|<[^>]+>", "", page)
    assert plain == "ROMEO:" + model.generate("ROMEO:", 20, seed=1)
    assert last.is_done
    assert len(last.tokens) == 20


def test_limits_are_enforced(model) -> None:
    for prompt, tokens in (("R" * (MAX_PROMPT_CHARS + 1), 5), ("R", MAX_NEW_TOKENS + 1), ("R", 0)):
        with pytest.raises(UserError):
            generate(model, prompt, tokens)
    for sampling in (
        SamplingParams(temperature=-1),
        SamplingParams(top_p=0),
        SamplingParams(top_k=-3),
    ):
        with pytest.raises(UserError):
            list(generate_with_limits(model, "R", max_new_tokens=5, params=sampling, seed=1))
    *_, last = generate(model, tokens=MAX_NEW_TOKENS, max_seconds=0)
    assert len(last.tokens) == 1
    assert "the limit for one text" in last.note


def test_only_checkpoints_of_the_run_can_be_loaded(run) -> None:
    loaded = []

    def load_model(folder):
        loaded.append(folder)
        return load(folder, device="cpu")

    models = ModelCache(load_model, run)
    names = models.names()
    assert names[:2] == ["best", "last"]
    assert names[2] == "step-000020"
    for name in names:
        models.get(name)
    # best and last are links to steps.
    assert len(set(loaded)) == len(names) - 2
    for unknown in ("../../etc", "step-999999", ""):
        with pytest.raises(UserError, match="choose another"):
            models.get(unknown)


def test_the_training_tab_shows_current_metrics(tmp_path) -> None:
    metrics, lines = tmp_path / "metrics.jsonl", []
    assert "no metrics" in training_tab(tmp_path, max_steps=100)
    for step in range(60):
        fields = {"loss": 4 - step / 50, "dt_ms": 100.0, "tok_per_sec": 1e4, "norm": 1, "lr": 1e-3}
        lines.append(json_line({"event": "train", "step": step, **fields}))
    metrics.write_text("".join(lines))
    page = training_tab(tmp_path, max_steps=100)
    assert "<b>60</b>" in page
    assert "4 seconds" in page
    assert "best val loss" not in page
    scores = {"val_loss": 3.21, "val_bpb": 2.5}
    lines.append(json_line({"event": "eval", "step": 60, **scores}))
    lines.append(json_line({"event": "eval", "step": 61, "val_loss": None, "val_bpb": None}))
    metrics.write_text("".join(lines))
    page = training_tab(tmp_path, max_steps=100)
    assert "3.210" in page
    assert "nan" not in page


def test_without_gradio_there_is_an_install_hint(program, run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = program("demo", run)
    assert done.code == 2
    assert "pip install -e '.[demo]'" in done.err


def test_a_wrong_argument_is_one_line(program) -> None:
    for args in (("demo", "nowhere"), ("demo", "run", "--port", "99999"), ("demo",)):
        done = program(*args)
        assert (done.code, done.err.count("\n")) == (2, 1)


def test_the_training_tab_has_the_picture_once_there_is_one(tmp_path) -> None:
    event = {"event": "train", "step": 0, "loss": 2.0, "dt_ms": 1.0, "tok_per_sec": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json_line({**event, "norm": 1.0, "lr": 1.0}))
    assert "<img" not in training_tab(tmp_path, max_steps=2)
    (tmp_path / "training_curves.png").write_bytes(b"first")
    first = training_tab(tmp_path, max_steps=2)
    assert '<img src="training_curves.png?' in first
    # Another picture has another address, so that browsers load it.
    (tmp_path / "training_curves.png").write_bytes(b"second")
    assert training_tab(tmp_path, max_steps=2) != first
