"""What a configuration leaves open, filled in: by the checkpoint to start from, and by the text."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

from gptforge.builders.import_model import import_if_needed
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config, GPTConfig
from gptforge.data.checks import quick_check
from gptforge.data.dataset import (
    BUNDLED_INPUT,
    Dataset,
    DatasetOptions,
    check_length,
    may_be_bundled_input,
    open_dataset,
    portable_input_name,
    resolve_input,
)
from gptforge.data.index import INDEX_FILE
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError
from gptforge.report.progress import ProgressMeter
from gptforge.shell import quote
from gptforge.tokenizers import NAMES, Tokenizer, from_name

Say = Callable[[str], None]

MODEL_FIELDS = frozenset(field.name for field in dataclasses.fields(GPTConfig)) - {"dropout"}


def resolve_init_from(
    config: Config, explicit: Collection[str], log: Say, *, temp_dir: Path | None = None
) -> Config:
    """With `--init_from`, shape and tokenizer are the checkpoint's, unless set by hand.

    With `scratch` another program's model is read by way of that folder, and not kept.
    """
    config = _read_as_before(_with_its_tokenizer(config, log), explicit)
    if not config.init_from:
        return config
    source = import_if_needed(config.init_from, log=log, temp_dir=temp_dir)
    config = dataclasses.replace(config, init_from=source)
    path = _initial_checkpoint(config)
    if reason := checkpoints.find_corruption(path, checkpoints.INFERENCE_FILES):
        raise UserError(f"--init_from {config.init_from} is damaged: {reason}")
    shape = checkpoints.read_config(path)
    for name in sorted(MODEL_FIELDS.intersection(explicit)):
        wanted, there = getattr(config, name), getattr(shape, name)
        if wanted != there and (name, wanted) != ("vocab_size", 0):
            raise UserError(
                f"--{name} {wanted}, but the model of --init_from {config.init_from} has {there}: "
                f"leave --{name} out"
            )
    taken = {name: getattr(shape, name) for name in MODEL_FIELDS if name not in explicit}
    if "tokenizer" not in explicit:
        taken["tokenizer"] = (path / checkpoints.TOKENIZER).as_posix()
    elif config.tokenizer not in ("char", "byte"):
        # What these two are depends on the text; any other is known before that is prepared.
        is_prepared = (Path(config.input) / INDEX_FILE).is_file()
        prepared = config.input if is_prepared else ""
        check_tokenizer(config, from_name(config.tokenizer, ""), prepared_path=prepared)
    if "context_length" not in explicit:
        taken["context_length"] = min(config.context_length, shape.block_size)
    return dataclasses.replace(config, **taken)


def check_tokenizer(config: Config, tokenizer: Tokenizer, *, prepared_path: str = "") -> None:
    """Refuse a tokenizer that is not that of `--init_from`, id for id.

    Every id would mean something else to the model, and nothing of what it knows be of use.

    Args:
        config: with `init_from` as `start_from` left it.
        tokenizer: that the text is encoded with.
        prepared: the shards that were made with it, if they were.

    Raises:
        UserError: if some id means something else, or there are more or fewer of them.
    """
    if not config.init_from:
        return
    path = _initial_checkpoint(config) / checkpoints.TOKENIZER
    own = checkpoints.read_tokenizer(path.parent)
    if own.to_json() == tokenizer.to_json():
        return
    what, fix = f"--tokenizer {config.tokenizer}", "leave --tokenizer out"
    if prepared_path:
        what = f"{prepared_path} was prepared with a tokenizer that"
        fix = f"prepare the text again with --tokenizer {quote(path.as_posix())}"
    raise UserError(
        f"{what} ({tokenizer.name}, {tokenizer.vocab_size:,} ids) is not the one of --init_from "
        f"{config.init_from} ({own.name}, {own.vocab_size:,} ids): the same ids would mean something "
        f"else; {fix}"
    )


def _initial_checkpoint(config: Config) -> Path:
    """Where the weights of a run with `--init_from` come from."""
    # A run that was begun this way has a tokenizer and a shape of its own by now.
    own = CheckpointStore(Path(resolve_out_dir(config)) / "checkpoints").read_link("last")
    return own if own and not config.restart else checkpoints.resolve_checkpoint(config.init_from)


def _read_as_before(config: Config, given: Collection[str]) -> Config:
    """How the files are read stays as it is in a run that goes on."""
    own = CheckpointStore(Path(resolve_out_dir(config)) / "checkpoints").read_link("last")
    if own is None or config.restart or checkpoints.find_corruption(own, (checkpoints.CONFIG,)):
        return config
    old = checkpoints.read_config(own, with_model=False)
    names = {"field", "kind", "split_by_name"}.difference(given)
    return dataclasses.replace(config, **{name: getattr(old, name) for name in names})


def _with_its_tokenizer(config: Config, say: Say) -> Config:
    """Where the file of a run's tokenizer is gone, the copy in its checkpoint."""
    is_there = config.tokenizer in NAMES or Path(config.tokenizer).exists()
    own = CheckpointStore(Path(resolve_out_dir(config)) / "checkpoints").read_link("last")
    if is_there or own is None or config.restart:
        return config
    is_whole = not checkpoints.find_corruption(own, (checkpoints.TOKENIZER, checkpoints.CONFIG))
    if not is_whole:
        return config
    if checkpoints.read_config(own, with_model=False).tokenizer != config.tokenizer:
        return config
    copy = (own / checkpoints.TOKENIZER).as_posix()
    say(f"note: {config.tokenizer} is not there any more: the run's own copy is used, {copy}")
    return dataclasses.replace(config, tokenizer=copy)


def load_dataset(
    config: Config, explicit: Collection[str], log: Say, progress: ProgressMeter
) -> Dataset:
    """What `--input` names, ready to be read, and fit to learn from; says what is doubtful.

    Raises:
        UserError: if it cannot be read, or is no good.
    """
    wanted = DatasetOptions(
        tokenizer=config.tokenizer,
        val_fraction=config.val_fraction,
        text_format=TextFormat(config.field, config.encoding),
        kind=config.kind,
        split_by_name=config.split_by_name,
        raw_bin=config.raw_bin,
        # A model that is begun from another one reads with that one's eyes.
        require_tokenizer="tokenizer" in explicit or bool(config.init_from),
        model_tokenizer=config.tokenizer
        if config.init_from and "tokenizer" not in explicit
        else "",
        require_val_fraction="val_fraction" in explicit,
    )
    name = config.input
    if "input" not in explicit and may_be_bundled_input(name):
        log(
            f"note: {name} is not here: the text that comes with the program is used, {BUNDLED_INPUT}"
        )
        name = BUNDLED_INPUT
    corpus = open_dataset(resolve_input(name), wanted, log=log, progress=progress)
    check_length(corpus, config.context_length, random_offset=config.random_offset)
    batch = config.global_batch_size
    for finding in quick_check(corpus, context_length=config.context_length, global_batch=batch):
        if finding.level == "error":
            raise UserError(str(finding))
        if finding.level == "warning":
            log(f"warning: {finding}")
    return corpus


def resolve_config(config: Config, dataset: Dataset) -> Config:
    """Fill in what was left to the program: vocabulary, run folder, text."""
    size = dataset.tokenizer.vocab_size
    vocab_size = config.vocab_size or -(-size // 64) * 64
    if vocab_size < size:
        raise UserError(
            f"--vocab_size {vocab_size} is less than the {size} ids of --tokenizer "
            f"{config.tokenizer}: give {size} or more, or 0 for as many as it needs"
        )
    return dataclasses.replace(
        config,
        vocab_size=vocab_size,
        out_dir=resolve_out_dir(config),
        input=portable_input_name(dataset.path),
        tokenizer=dataset.tokenizer_name,
        val_fraction=dataset.val_fraction,
    )


def resolve_out_dir(config: Config) -> str:
    """The run folder, named or not."""
    return config.out_dir or f"runs/{config.preset or 'custom'}"


def describe_dataset(dataset: Dataset, config: Config) -> str:
    """A line on the text: its size, what is held out, and how often it will be read."""
    train, held_out = len(dataset.train), len(dataset.val)
    epochs = config.max_steps * config.tokens_per_step / train
    held = f"{held_out:,} held out" if held_out else "none held out"
    if 0 < config.eval_tokens < held_out:
        held += f", of which {config.eval_tokens:,}, evenly spread, judge as it goes"
    many = f" in {dataset.documents:,} documents" if dataset.documents > 2 else ""
    size = f", {dataset.characters:,} characters{many}" if dataset.characters else ""
    return (
        f"{dataset.path.as_posix()}{size}; {train:,} "
        f"{dataset.tokenizer.name} tokens to learn from, {held}; about {epochs:.1f} epochs"
    )
