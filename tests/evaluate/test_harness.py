"""`eval --tasks` with names of lm-evaluation-harness: handed to it, with our model."""

import json
import sys
from pathlib import Path

import pytest

from gptforge.evaluate.harness import _metric_name
from tests.programs import DEBUG

EVAL = ("eval", "run", "--device", "cpu", "--tasks")
CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{start}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WRITING = """\
task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{rows}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{start}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def run(program, play) -> None:
    more = ("--tokenizer", "gpt2", "--max_steps", 3, "--input", play, "--out_dir", "run")
    assert program(*DEBUG, *more).code == 0


@pytest.fixture
def tasks(run, tmp_path) -> None:
    from gptforge import load
    from gptforge.inference.sampling import SamplingParams

    writer = load("run", device="cpu")
    starts = ["What light is", "JULIET:", "in yonder window? " * 20]
    # The harness leaves room for what is to be written: 27 of 32 tokens.
    fits = [writer.decode(writer.encode(start)[-27:]) for start in starts]
    texts = [one.text for one in writer.generate_batch(fits, 5, SamplingParams(0), stop="\n")]
    texts[0] = "something else"
    rows = [
        {"start": start, "endings": [" light", " 7 in yonder"], "label": i % 2, "written": text}
        for i, (start, text) in enumerate(zip(starts, texts, strict=True))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    Path("own").mkdir()
    where = {"rows": (tmp_path / "rows.jsonl").as_posix(), "cache": (tmp_path / "c").as_posix()}
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}.items():
        Path(f"own/{name}.yaml").write_text(text.format(**where), encoding="utf-8")


def test_the_figures_are_those_of_the_harness_with_the_export(program, tasks) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["tiny_choice", "tiny_rolling", "tiny_writing"]
    done = program(*EVAL, ",".join(names), "--include_path", "own", "--json")
    assert done.code == 0, done.err
    ours = json.loads(done.out)["tasks"]
    assert [ours[name]["questions"] for name in names] == [3, 3, 3]
    # The first of three was put down wrongly.
    assert ours["tiny_writing"]["exact_match"] == pytest.approx(2 / 3)

    assert program("export", "run", "--to", "hf", "out").code == 0
    theirs = simple_evaluate(
        model=HFLM(pretrained="out", device="cpu", dtype="float32"),
        tasks=names,
        task_manager=TaskManager(include_path="own"),
        bootstrap_iters=1000,
    )["results"]
    for name, figure in (
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_rolling", "bits_per_byte"),
        ("tiny_writing", "exact_match"),
    ):
        assert ours[name][figure] == pytest.approx(theirs[name][f"{figure},none"], rel=1e-4)
    said = program(*EVAL, "tiny_choice", "--include_path", "own", "--limit", 1).out
    assert said.startswith("tiny_choice: acc ")
    assert said.endswith(", of 1 questions\n")


def test_a_name_that_nobody_knows_gets_those_like_it(program, run) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    done = program(*EVAL, "winogrand")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "neither built in (hellaswag, lambada) nor known to lm_eval" in done.err
    assert "winogrande" in done.err


def test_questions_that_cannot_be_loaded_are_one_line(program, tasks) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    Path("rows.jsonl").unlink()
    done = program(*EVAL, "tiny_choice", "--include_path", "own")
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("error: --tasks tiny_choice: lm_eval cannot load its questions")


def test_without_the_package_its_command_is_said(program, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = program(*EVAL, "winogrande")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "--tasks winogrande: built in are hellaswag, lambada" in done.err
    assert "pip install -e '.[lm-eval]'" in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("winogrande=file.jsonl",), "files are read for hellaswag, lambada only"),
        (("winogrande", "--include_path", "nowhere"), "--include_path nowhere: no such folder"),
    ],
)
def test_what_goes_with_no_harness_is_refused(program, args, words) -> None:
    done = program(*EVAL, *args)
    assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_figures_are_named_by_metric_and_filter() -> None:
    assert _metric_name("acc,none") == "acc"
    assert _metric_name("acc_stderr,none") == "acc_stderr"
    assert _metric_name("exact_match,strict") == "exact_match,strict"
    assert _metric_name("exact_match_stderr,strict") == "exact_match,strict_stderr"
