"""`eval --tasks` with tasks of lm-evaluation-harness."""

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
GENERATION = """\
task: tiny_generation
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

    lm = load("run", device="cpu")
    starts = ["What light is", "JULIET:", "in yonder window? " * 20]
    # The harness leaves room for the new tokens: 27 of 32.
    fits = [lm.decode(lm.encode(start)[-27:]) for start in starts]
    texts = [c.text for c in lm.generate_batch(fits, 5, SamplingParams(0), stop="\n")]
    texts[0] = "something else"
    rows = [
        {"start": start, "endings": [" light", " 7 in yonder"], "label": i % 2, "written": text}
        for i, (start, text) in enumerate(zip(starts, texts, strict=True))
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("rows.jsonl").write_text(lines, encoding="utf-8")
    Path("tasks").mkdir()
    paths = {"rows": (tmp_path / "rows.jsonl").as_posix(), "cache": (tmp_path / "c").as_posix()}
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "generation": GENERATION}.items():
        Path(f"tasks/{name}.yaml").write_text(text.format(**paths), encoding="utf-8")


def test_metrics_equal_those_of_the_exported_model(program, tasks) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["tiny_choice", "tiny_rolling", "tiny_generation"]
    done = program(*EVAL, ",".join(names), "--include_path", "tasks", "--json")
    assert done.code == 0, done.err
    scores = json.loads(done.out)["tasks"]
    assert [scores[name]["questions"] for name in names] == [3, 3, 3]
    # The expected text of the first of three is wrong.
    assert scores["tiny_generation"]["exact_match"] == pytest.approx(2 / 3)

    assert program("export", "run", "--to", "hf", "out").code == 0
    expected = simple_evaluate(
        model=HFLM(pretrained="out", device="cpu", dtype="float32"),
        tasks=names,
        task_manager=TaskManager(include_path="tasks"),
        bootstrap_iters=1000,
    )["results"]
    for name, metric in (
        ("tiny_choice", "acc"),
        ("tiny_choice", "acc_norm"),
        ("tiny_rolling", "bits_per_byte"),
        ("tiny_generation", "exact_match"),
    ):
        assert scores[name][metric] == pytest.approx(expected[name][f"{metric},none"], rel=1e-4)
    out = program(*EVAL, "tiny_choice", "--include_path", "tasks", "--limit", 1).out
    assert out.startswith("tiny_choice: acc ")
    assert out.endswith(", of 1 examples\n")


def test_unknown_task_gets_similar_names(program, run) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    done = program(*EVAL, "winogrand")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "neither built in (hellaswag, lambada) nor in lm_eval" in done.err
    assert "winogrande" in done.err


def test_task_data_that_cannot_be_loaded_is_one_line(program, tasks) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    Path("rows.jsonl").unlink()
    done = program(*EVAL, "tiny_choice", "--include_path", "tasks")
    assert done.code == 2
    last = done.err.splitlines()[-1]
    assert last.startswith("error: --tasks tiny_choice: lm_eval cannot load its questions")


def test_missing_package_gets_an_install_hint(program, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    done = program(*EVAL, "winogrande")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "--tasks winogrande: built in are hellaswag, lambada" in done.err
    assert "pip install -e '.[lm-eval]'" in done.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("winogrande=file.jsonl",), "files are read for hellaswag, lambada only"),
        (("winogrande", "--include_path", "gone"), "--include_path gone: no such folder"),
    ],
)
def test_invalid_flags_are_refused(program, args, message) -> None:
    done = program(*EVAL, *args)
    assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_metric_names() -> None:
    assert _metric_name("acc,none") == "acc"
    assert _metric_name("acc_stderr,none") == "acc_stderr"
    assert _metric_name("exact_match,strict") == "exact_match,strict"
    assert _metric_name("exact_match_stderr,strict") == "exact_match,strict_stderr"
