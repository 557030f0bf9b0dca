"""What `eval --tasks` asks a model, and where the questions come from."""

import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gptforge.build.trained import load
from gptforge.checkpoint import store as checkpoints
from gptforge.convert.hf import is_hf
from gptforge.errors import RunError, UserError, install_hint, parsing
from gptforge.evaluate.harness import ask_harness, harness_tasks
from gptforge.evaluate.tasks import TASKS, Question, answer
from gptforge.files import open_regular
from gptforge.hardware import choose_precision
from gptforge.report.patience import Patience

ON_THE_HUB = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "lambada": ("EleutherAI/lambada_openai", "test"),
}
"""Where the Hugging Face Hub has a task, and which part of it is asked."""
LONGEST_LINE = 2**20
"""Characters of a line of questions; a hundred times the longest of HellaSwag's and LAMBADA's."""
Scores = dict[str, dict[str, float]]


def ask(
    run: str, tasks: str, *, limit: int = 0, device: str = "auto", include_path: str = ""
) -> Scores:
    """Put questions to a model; each task's scores by their names in the harness.

    Args:
        run: as `load` takes it.
        tasks: names with commas between; `NAME=FILE` reads JSON lines instead of the Hub. Names
            that are not built in are lm-evaluation-harness's.
        limit: ask the first so many of each task; 0: all.
        device: as `load` takes it.
        include_path: folder with more tasks for lm-evaluation-harness.

    Raises:
        UserError: for an unknown task, or questions that cannot be had or read.
    """
    if limit < 0:
        raise UserError(f"--limit must be 0 or more, not {limit}")
    named = [task.strip().partition("=") for task in tasks.split(",")]
    others = [name for name, _, _ in named if name not in TASKS]
    for name, _, file in named:
        if file and name in others:
            raise UserError(f"--tasks {name}={file}: files are read for {', '.join(TASKS)} only")
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such folder")
    manager = harness_tasks(others, include_path) if others else None
    asked = {name: _questions(name, file, limit) for name, _, file in named if name in TASKS}
    writer = load(run, device=device)
    dtype = "auto"
    if not is_hf(Path(run)):
        dtype = checkpoints.read_config(checkpoints.resolve(run)).dtype
    precision = choose_precision(dtype, writer.device)
    scores = {}
    for name, questions in asked.items():
        answers = answer(writer, questions, precision, asked=Patience(name))
        if any(math.isnan(one.logprob) for given in answers for one in given):
            raise RunError(f"{run}: its answers are no numbers: the training of it broke down")
        scores[name] = TASKS[name].score(questions, answers) | {"questions": len(questions)}
    if others:
        scores |= ask_harness(writer, others, manager, precision, limit)
    return scores


def _questions(name: str, file: str, limit: int) -> list[Question]:
    rows = _of_a_file(Path(file)) if file else _of_the_hub(name)
    found = []
    where = file or ON_THE_HUB[name][0]
    for number, row in enumerate(islice(rows, limit or None), 1):
        with parsing(f"{where}, line {number}", f"a question of {name}"):
            found.append(TASKS[name].read(row))
    if not found:
        raise UserError(f"{where}: there are no questions")
    return found


def _of_a_file(path: Path) -> Iterable[Mapping[str, Any]]:
    with parsing(path, "JSON lines"), open_regular(path, "r", encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), ""), 1):
            if not line.strip():
                continue
            if len(line) == LONGEST_LINE:
                raise UserError(f"{path}, line {number}: too long for a question")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield row


def _of_the_hub(name: str) -> Iterable[Mapping[str, Any]]:
    instead = f"or give the file: --tasks {name}=FILE.jsonl"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"--tasks {name} is fetched by the package datasets: {install_hint('tasks')}, {instead}"
        )
    import datasets

    source, part = ON_THE_HUB[name]
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(source, split=part)
    except Exception as error:
        # It raises whatever its network library does.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--tasks {name}: {source} is not to be had: {first}: try again with a network, "
            f"{instead}"
        ) from None
    return rows
