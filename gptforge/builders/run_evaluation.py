"""Evaluate a saved model: loss on held-out text, and the scores of benchmark tasks."""

import dataclasses
import importlib.util
import itertools
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gptforge.builders.load_model import SavedModel, language_model, load_saved
from gptforge.checkpoint import format as checkpoints
from gptforge.config import Config
from gptforge.convert.hf_tokenizer import NATIVE_TOKENIZER
from gptforge.data.dataset import BUNDLED_INPUT, DatasetOptions, open_dataset, resolve_input
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.token_dataset import TokenDataset
from gptforge.device import select_eval_precision
from gptforge.errors import RunError, UserError, first_line, install_hint, parsing
from gptforge.evaluate.harness import load_task_manager, run_harness
from gptforge.evaluate.tasks import TASKS, Example, score_choices
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.files import open_regular
from gptforge.patterns import expand_glob
from gptforge.report.console import ProgressMeter
from gptforge.report.format import ValLoss
from gptforge.tokenizers.base import byte_lengths, char_lengths

logger = logging.getLogger(__name__)

HUB_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "lambada": ("EleutherAI/lambada_openai", "test"),
}
"""Dataset and split on the Hugging Face Hub of each task."""
MAX_LINE = 2**20
"""Longest line of a task file in characters; a hundred times the longest of the two tasks."""
DATA_OPTIONS = DatasetOptions(val_fraction=0.0, needs_val=True)
"""How `--data` is read: evaluated in full, or by its validation split if it has one."""
Scores = dict[str, dict[str, float]]


def evaluate_run(
    run: str | Path,
    *,
    data: str = "",
    data_options: DatasetOptions = DATA_OPTIONS,
    device: str = "auto",
) -> ValLoss:
    """Compute the loss of a saved model on another text, or on the text its run held out.

    Args:
        run: see `load`, also for `device`.
        data: a text, or shards; empty: what the run held out.
        data_options: how to read `data`; the tokenizer is the model's.

    Raises:
        UserError: if there is no model or no such text, or the run held nothing out.
    """
    saved = load_saved(run, with_state=True)
    model, config = language_model(saved.bundle, device=device), _config(saved)
    tokenizer_path = saved.path / NATIVE_TOKENIZER
    if not tokenizer_path.is_file():
        tokenizer_path = saved.path / checkpoints.TOKENIZER
    options = data_options
    if not data:
        options = DatasetOptions(
            val_fraction=config.val_fraction,
            text_format=TextFormat(config.field, config.encoding),
            kind=config.kind,
            split_by_name=config.split_by_name,
            raw_bin=config.raw_bin,
        )
    options = dataclasses.replace(
        options,
        tokenizer=model.tokenizer,
        require_tokenizer=True,
        model_tokenizer=tokenizer_path.as_posix(),
    )
    if data:
        tokens = _open_data(str(run), data, options, config, saved.state)
    else:
        tokens = _open_val_split(str(run), options, config, saved.state)
    if len(tokens) < 2:
        raise UserError(f"{data or config.input}: an evaluation needs at least 2 tokens")
    evaluator = ValEvaluator(
        tokens,
        byte_lengths(model.tokenizer),
        char_lengths=char_lengths(model.tokenizer),
        context_length=config.context_length,
        batch_size=config.batch_size,
    )
    precision = select_eval_precision(config.dtype, model.device)
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as in training
    try:
        with ProgressMeter("evaluating") as meter:
            return evaluator.evaluate(model.model, precision, progress=meter)
    finally:
        torch.set_float32_matmul_precision(matmul_precision)


def _config(saved: SavedModel) -> Config:
    """The configuration; an exported model is evaluated with its full context."""
    return saved.config or Config(context_length=saved.bundle.config.block_size)


def _open_data(
    run: str, data: str, options: DatasetOptions, config: Config, state: Mapping[str, Any]
) -> TokenDataset:
    """Open `--data`; warn if the model was trained on it, and say which split is used."""
    with ProgressMeter("preparing the text") as meter:
        dataset = open_dataset(Path(data), options, progress=meter)
    for notice in () if meter.total else dataset.notices:  # else its preparation logged them
        logger.info(f"note: {notice}")
    has_val = len(dataset.val) > 0
    if has_val:
        logger.info(f"note: evaluating the validation split of {data}, not the rest")
    if state and (known := dataset.known_to(state, config.val_fraction)):
        memorized, hint = "this says how well the model remembers it", ""
        if config.val_fraction and not _is_missing(config.input):
            hint = "; without --data the held-out part is evaluated"
        elif config.val_fraction:
            hint = f"; to evaluate the held-out part, put the text back to {config.input}"
        logger.warning(f"warning: {run} was trained on {known}: {memorized}{hint}")
    return dataset.val if has_val else dataset.train


def _open_val_split(
    run: str, options: DatasetOptions, config: Config, state: Mapping[str, Any]
) -> TokenDataset:
    if not state:
        raise UserError(
            f"{run} is a model without its run, and does not say which text it was not trained on: "
            "give one with --data PATH"
        )
    missing = (
        f"the training text of {run}, {config.input}, is not here: put it back, or give another "
        "text with --data"
    )
    # The path of the bundled text depends on the folder and version; its hash does not.
    is_gone = _is_missing(config.input)
    if is_gone and Path(config.input).name != "input.txt":
        raise UserError(missing)
    try:
        path = resolve_input("" if is_gone else config.input)
        with ProgressMeter("preparing the text") as meter:
            dataset = open_dataset(path, options, progress=meter)
    except UserError as error:
        raise UserError(
            f"the training text of {run}, {config.input}, cannot be read any more: it has changed "
            f"or is damaged ({error}); give a text with --data"
        ) from None
    has_changed = dataset.val_fraction != config.val_fraction  # by another preparation
    if has_changed or state["text_sha256"] != dataset.sha256:
        raise UserError(
            missing
            if is_gone
            else f"{config.input} has changed since {run} was trained on it, and so has the "
            "held-out part: give a text with --data"
        )
    if not len(dataset.val):
        raise UserError(f"{run} held nothing out: give a text with --data PATH")
    return dataset.val


def _is_missing(name: str) -> bool:
    return name != BUNDLED_INPUT and not Path(name).exists() and not expand_glob(name)


def evaluate_tasks(
    run: str, tasks: str, *, limit: int = 0, device: str = "auto", include_path: str = ""
) -> Scores:
    """Score a saved model on benchmark tasks; metrics have their names in lm-evaluation-harness.

    Args:
        run: see `load`, also for `device`.
        tasks: comma-separated names; `NAME=FILE` reads JSON lines instead of the Hub. Names
            that are not built in are run by lm-evaluation-harness, also those in `include_path`.
        limit: examples of each task, the first ones; 0: all.

    Raises:
        UserError: for an unknown task, or examples that cannot be downloaded or read.
    """
    if limit < 0:
        raise UserError(f"--limit must be 0 or more, not {limit}")
    parsed = [task.strip().partition("=") for task in tasks.split(",")]
    harness_names = [name for name, _, _ in parsed if name not in TASKS]
    for name, _, file in parsed:
        if file and name in harness_names:
            raise UserError(f"--tasks {name}={file}: files are read for {', '.join(TASKS)} only")
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such folder")
    manager = load_task_manager(harness_names, include_path) if harness_names else None
    examples = {n: _load_examples(n, file, limit) for n, _, file in parsed if n in TASKS}
    saved = load_saved(run)
    model = language_model(saved.bundle, device=device)
    precision = select_eval_precision(_config(saved).dtype, model.device)
    scores: Scores = {}
    for name, questions in examples.items():
        with ProgressMeter(name) as meter:
            answers = score_choices(model, questions, precision, progress=meter)
        if any(math.isnan(choice.loglikelihood) for choices in answers for choice in choices):
            raise RunError(f"{run}: the model's loss is NaN: its training diverged")
        scores[name] = TASKS[name].score(questions, answers) | {"questions": len(questions)}
    if harness_names:
        scores |= run_harness(model, harness_names, manager, precision, limit)
    return scores


def _load_examples(name: str, file: str, limit: int) -> list[Example]:
    rows = _read_jsonl(Path(file)) if file else _load_hub_dataset(name)
    source = file or HUB_DATASETS[name][0]
    examples = []
    for number, row in enumerate(itertools.islice(rows, limit or None), 1):
        with parsing(f"{source}, line {number}", f"an example of {name}"):
            examples.append(TASKS[name].parse(row))
    if not examples:
        raise UserError(f"{source}: there are no examples")
    return examples


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    with parsing(path, "JSON lines"), open_regular(path, "r", encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
            if not line.strip():
                continue
            if len(line) == MAX_LINE:
                raise UserError(f"{path}, line {number}: too long for an example")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield row


def _load_hub_dataset(name: str) -> Iterable[Mapping[str, Any]]:
    instead = f"or give the file: --tasks {name}=FILE.jsonl"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"--tasks {name} needs the package datasets: {install_hint('tasks')}, {instead}"
        )
    import datasets

    source, split = HUB_DATASETS[name]
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(source, split=split)
    except Exception as error:
        # It raises anything that its network library raises.
        raise UserError(
            f"--tasks {name}: {source} cannot be downloaded: {first_line(error)}: try again with a "
            f"network, {instead}"
        ) from None
    return rows
