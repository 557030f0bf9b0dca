"""What the page shows, and its bounds, without a browser."""

import re
from math import log

import pytest

from gptforge.builders import load
from gptforge.demo.sessions import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARS,
    ModelCache,
    generate_with_limits,
)
from gptforge.demo.token_html import PROBABILITY_BINS, render_status, render_tokens
from gptforge.demo.training_tab import render_training
from gptforge.errors import UserError
from gptforge.files import json_line
from gptforge.inference.language_model import Token
from gptforge.inference.sampling import SamplingParams
from tests.convert.conftest import run as run
from tests.convert.conftest import trained_run as trained_run


@pytest.fixture
def model(run):
    return load(run, device="cpu")


def ask(model, prompt="ROMEO:", tokens=20, **more):
    return list(
        generate_with_limits(
            model, prompt, max_new_tokens=tokens, params=SamplingParams(), seed=1, **more
        )
    )


def test_text_from_a_model_is_never_markup() -> None:
    tricky = Token(0, '<img src=x onerror="alert(1)">', log(0.5), (('"><b>', log(0.5)),))
    page = render_tokens("<script>alert(2)</script>", [tricky], is_generating=False)
    assert "<img" not in page
    assert "<script" not in page
    assert '"><b>' not in page
    assert "<script" not in render_status("<script>")


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.5, 0.7, 0.9, 1.0])
def test_the_tint_tells_the_probability(share) -> None:
    page = render_tokens("", [Token(0, "a", log(share), (("b", log(share)),))], is_generating=False)
    assert f'class="t s{sum(share >= step for step in PROBABILITY_BINS)}"' in page
    assert f"was given {share:.1%}" in page


def test_the_page_holds_the_text_that_was_written(model) -> None:
    *_, last = ask(model)
    page = render_tokens("ROMEO:", last.tokens, is_generating=False)
    plain = re.sub(r"<b class=\"line\">↵</b>|<[^>]+>", "", page)
    assert plain == "ROMEO:" + model.generate("ROMEO:", 20, seed=1)
    assert last.is_done
    assert len(last.tokens) == 20


def test_bounds_are_kept_whatever_is_sent(model) -> None:
    for prompt, tokens in (("R" * (MAX_PROMPT_CHARS + 1), 5), ("R", MAX_NEW_TOKENS + 1), ("R", 0)):
        with pytest.raises(UserError):
            ask(model, prompt, tokens)
    for sampling in (
        SamplingParams(temperature=-1),
        SamplingParams(top_p=0),
        SamplingParams(top_k=-3),
    ):
        with pytest.raises(UserError):
            list(generate_with_limits(model, "R", max_new_tokens=5, params=sampling, seed=1))
    *_, last = ask(model, tokens=MAX_NEW_TOKENS, max_seconds=0)
    assert len(last.tokens) == 1
    assert "the most that one text may take" in last.note


def test_a_visitor_chooses_among_the_checkpoints_and_nothing_else(run) -> None:
    asked = []

    def opened(folder, say):
        asked.append(folder)
        return load(folder, device="cpu")

    writers = ModelCache(opened, run)
    names = writers.names()
    assert names[:2] == ["best", "last"]
    assert names[2] == "step-000020"
    for name in names:
        writers.get(name)
    # best and last lead to steps: none of them is read twice in a row.
    assert len(set(asked)) == len(names) - 2
    for stranger in ("../../etc", "step-999999", ""):
        with pytest.raises(UserError, match="choose another"):
            writers.get(stranger)


def test_curves_grow_with_the_run(tmp_path) -> None:
    metrics, lines = tmp_path / "metrics.jsonl", []
    assert "no figures" in render_training(tmp_path, max_steps=100)
    for step in range(60):
        shown = {"loss": 4 - step / 50, "dt_ms": 100.0, "tok_per_sec": 1e4, "norm": 1, "lr": 1e-3}
        lines.append(json_line({"event": "train", "step": step, **shown}))
    metrics.write_text("".join(lines))
    page = render_training(tmp_path, max_steps=100)
    assert "<b>60</b>" in page
    assert "4 seconds" in page
    assert "best held-out" not in page
    score = {"val_loss": 3.21, "val_bpb": 2.5}
    lines.append(json_line({"event": "eval", "step": 60, **score}))
    lines.append(json_line({"event": "eval", "step": 61, "val_loss": None, "val_bpb": None}))
    metrics.write_text("".join(lines))
    page = render_training(tmp_path, max_steps=100)
    assert "3.210" in page
    assert "nan" not in page


def test_without_gradio_it_says_what_to_install(program, run, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = program("demo", run)
    assert done.code == 2
    assert "pip install -e '.[demo]'" in done.err


def test_a_wrong_call_is_one_line(program) -> None:
    for args in (("demo", "nowhere"), ("demo", "run", "--port", "99999"), ("demo",)):
        done = program(*args)
        assert (done.code, done.err.count("\n")) == (2, 1)


def test_a_loss_near_the_smallest_float_is_drawn(tmp_path) -> None:
    event = {"event": "train", "dt_ms": 1.0, "tok_per_sec": 1.0, "norm": 1.0, "lr": 1.0}
    lines = [json_line({**event, "step": i, "loss": loss}) for i, loss in enumerate((1e-320, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert "<svg" in render_training(tmp_path, max_steps=2)
