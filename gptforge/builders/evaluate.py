"""What `eval --tasks` asks a model, and where the questions come from."""

import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gptforge import files
from gptforge.builders.load_model import load
from gptforge.checkpoint import store as checkpoints
from gptforge.config import Config
from gptforge.convert.hf import is_hf_dir
from gptforge.convert.hf_tokenizer import NATIVE_TOKENIZER
from gptforge.data.dataset import BUNDLED_INPUT, DatasetOptions, open_dataset, resolve_input
from gptforge.data.prepare.sources import FileKind
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.token_dataset import TokenDataset
from gptforge.device import select_precision
from gptforge.errors import (
    RunError,
    UserError,
    install_hint,
    parsing,
)
from gptforge.evaluate.harness import load_task_manager, run_harness
from gptforge.evaluate.tasks import TASKS, Example, score_choices
from gptforge.evaluate.val_loss import ValEvaluator, ValLoss
from gptforge.files import open_regular
from gptforge.printable import pluralize, print_stderr
from gptforge.report.progress import EtaNotice
from gptforge.tokenizers import byte_lengths


def evaluate_run(
    run: str | Path,
    *,
    data: str = "",
    encoding: str = "",
    field: str = "",
    kind: FileKind | Literal["auto"] = "auto",
    device: str = "auto",
) -> ValLoss:
    """Judge a run's model by another text, or by the part of its own that it held out.

    Args:
        run: as `load` takes it.
        data: a text, judged as a whole, or shards, by what they hold out, else as a whole; empty:
            what the run held out.
        encoding: of `data`; empty: utf-8, whatever the run's own text is written in.
        field: of JSON lines or columns in `data` that holds the text; empty: text.
        kind: what `data` holds; auto goes by its name.
        device: as `load` takes it.

    Raises:
        UserError: if there is no model or no such text, or the run held nothing out.
    """
    for flag, value in (("encoding", encoding), ("field", field), ("kind", kind)):
        if value not in ("", "auto") and not data:
            raise UserError(f"--{flag} is that of the text of --data: give both, or neither")
    writer = load(run, device=device)
    state: dict[str, Any] | None = None
    if is_hf_dir(Path(run)):
        config = Config(context_length=writer.model.config.block_size)
        own = Path(run) / NATIVE_TOKENIZER
        tokenizer_file = own if own.is_file() else Path(run) / checkpoints.TOKENIZER
    else:
        path = checkpoints.resolve_checkpoint(str(run))
        tokenizer_file = path / checkpoints.TOKENIZER
        config = checkpoints.read_config(path)
        state = checkpoints.read_state(path) if (path / checkpoints.STATE).exists() else None
    sha256 = None if state is None else str(state["text_sha256"])
    form = TextFormat(config.field, config.encoding)
    if data:
        form = TextFormat(field or TextFormat.field, encoding or TextFormat.encoding)
    wanted = DatasetOptions(
        tokenizer=writer.tokenizer,
        val_fraction=0.0 if data else config.val_fraction,
        text_format=form,
        kind=kind if data else config.kind,
        split_by_name=bool(data) or config.split_by_name,
        raw_bin=config.raw_bin,
        require_tokenizer=True,
        model_tokenizer=tokenizer_file.as_posix(),
        needs_val=bool(data),
    )
    if data:
        inputs = state.get("inputs") if state else None
        learned = frozenset(map(str, inputs) if isinstance(inputs, list) else ())
        tokens = _open_data(data, wanted, run, sha256, learned, config)
    else:
        tokens = _open_val_split(run, wanted, sha256, config)
    if len(tokens) < 2:
        raise UserError(f"{data or config.input}: 2 tokens are needed to judge anything")
    held_out = ValEvaluator(
        tokens,
        byte_lengths(writer.tokenizer),
        context_length=config.context_length,
        batch_size=config.batch_size,
    )
    precision = select_precision(config.dtype, writer.device)
    waits, batches = EtaNotice(f"judging by {held_out.num_tokens:,} tokens"), itertools.count(1)

    def show_progress() -> bool:
        waits(next(batches), held_out.num_batches)
        return False

    score = held_out.evaluate_until(show_progress, writer.model, precision)
    assert isinstance(score, ValLoss), "nothing stops it"
    return score


def _open_data(
    data: str,
    wanted: DatasetOptions,
    run: str | Path,
    sha256: str | None,
    learned: frozenset[str],
    config: Config,
) -> TokenDataset:
    """What to judge by in `--data`; says which part that is, and if it was learned."""
    corpus = open_dataset(Path(data), wanted, log=print_stderr)
    holds_out = len(corpus.val) > 0
    if holds_out:
        print_stderr(f"note: judged by the part that {data} holds out, not by the rest")
    # A smaller share of the same text lies within a larger one.
    was_held_out = holds_out and corpus.val_fraction <= config.val_fraction
    if sha256 == corpus.sha256 and not was_held_out:
        instead = "; without --data the part that was held out is judged"
        print_stderr(
            f"warning: {data} is what {run} learned from: this says how well it is remembered"
            f"{instead if config.val_fraction else ''}"
        )
    elif sha256 != corpus.sha256 and (
        known := corpus.input_fingerprints("val" if holds_out else "train") & learned
    ):
        files = (
            f"{pluralize(len(known), 'file', 'files')} of " if len(corpus.input_splits) > 1 else ""
        )
        print_stderr(
            f"warning: {files}{data} went into the training of {run}, whole or in part: this says "
            "how well it is remembered"
        )
    return corpus.val if holds_out else corpus.train


def _open_val_split(
    run: str | Path, wanted: DatasetOptions, sha256: str | None, config: Config
) -> TokenDataset:
    """The part of its own text that a run did not learn."""
    if sha256 is None:
        raise UserError(
            f"{run} is a model without its run, and does not say which text it has not learned: "
            "give one with --data PATH"
        )
    missing = f"the text that {run} learned, {config.input}, is not here: give a text with --data"
    # Seen from another folder, the text that comes along is elsewhere; its content tells.
    is_there = config.input == BUNDLED_INPUT or Path(config.input).exists()
    is_gone = not is_there and not files.expand_glob(config.input)
    if is_gone and Path(config.input).name != "input.txt":
        raise UserError(missing)
    try:
        corpus = open_dataset(
            resolve_input("" if is_gone else config.input), wanted, log=print_stderr
        )
    except UserError as error:
        raise UserError(
            f"what {run} learned, {config.input}, cannot be read any more: it has changed or is "
            f"damaged ({error}); give a text with --data"
        ) from None
    if sha256 != corpus.sha256:
        raise UserError(
            missing
            if is_gone
            else f"{config.input} has changed since {run} learned it, and so has the part that was "
            "held out: give a text with --data"
        )
    if not len(corpus.val):
        raise UserError(f"{run} held nothing out: give a text with --data PATH")
    return corpus.val


HUB_DATASETS = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "lambada": ("EleutherAI/lambada_openai", "test"),
}
"""Where the Hugging Face Hub has a task, and which part of it is asked."""
MAX_LINE = 2**20
"""Characters of a line of questions; a hundred times the longest of HellaSwag's and LAMBADA's."""
Scores = dict[str, dict[str, float]]


def evaluate_tasks(
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
    manager = load_task_manager(others, include_path) if others else None
    asked = {name: _load_examples(name, file, limit) for name, _, file in named if name in TASKS}
    writer = load(run, device=device)
    dtype = "auto"
    if not is_hf_dir(Path(run)):
        dtype = checkpoints.read_config(checkpoints.resolve_checkpoint(run)).dtype
    precision = select_precision(dtype, writer.device)
    scores = {}
    for name, questions in asked.items():
        answers = score_choices(writer, questions, precision, progress=EtaNotice(name))
        if any(math.isnan(one.loglikelihood) for given in answers for one in given):
            raise RunError(f"{run}: its answers are no numbers: the training of it broke down")
        scores[name] = TASKS[name].score(questions, answers) | {"questions": len(questions)}
    if others:
        scores |= run_harness(writer, others, manager, precision, limit)
    return scores


def _load_examples(name: str, file: str, limit: int) -> list[Example]:
    rows = _read_jsonl(Path(file)) if file else _load_hub_dataset(name)
    found = []
    where = file or HUB_DATASETS[name][0]
    for number, row in enumerate(islice(rows, limit or None), 1):
        with parsing(f"{where}, line {number}", f"a question of {name}"):
            found.append(TASKS[name].parse(row))
    if not found:
        raise UserError(f"{where}: there are no questions")
    return found


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    with parsing(path, "JSON lines"), open_regular(path, "r", encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE), ""), 1):
            if not line.strip():
                continue
            if len(line) == MAX_LINE:
                raise UserError(f"{path}, line {number}: too long for a question")
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: not a JSON object")
            yield row


def _load_hub_dataset(name: str) -> Iterable[Mapping[str, Any]]:
    instead = f"or give the file: --tasks {name}=FILE.jsonl"
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"--tasks {name} is fetched by the package datasets: {install_hint('tasks')}, {instead}"
        )
    import datasets

    source, part = HUB_DATASETS[name]
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
