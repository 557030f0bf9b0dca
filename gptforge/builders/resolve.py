"""Fill in what a configuration leaves open, from `--init_from`, the run folder and the text."""

import dataclasses
import glob
import logging
import re
from collections.abc import Collection
from pathlib import Path

from gptforge.builders.import_model import import_if_needed
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.out_dir import TEACHERS
from gptforge.checkpoint.run_dir import is_run_of
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config, GPTConfig
from gptforge.config_file import run_file_values
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
from gptforge.data.prepare.sources import is_pipe
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import INDEX_FILE
from gptforge.errors import UserError
from gptforge.presets import FINETUNE
from gptforge.report.console import ProgressMeter
from gptforge.shell import quote
from gptforge.tokenizers import NAMES, TEXT_DEPENDENT, Tokenizer, from_name
from gptforge.tokenizers.hf_bpe import MIN_VOCAB_SIZE

logger = logging.getLogger(__name__)

MODEL_FIELDS = frozenset(field.name for field in dataclasses.fields(GPTConfig)) - {"dropout"}


def resolve_init_from(
    config: Config, explicit: Collection[str], *, temp_dir: Path | None = None
) -> Config:
    """Take shape and tokenizer from the checkpoint of `--init_from`, unless set explicitly.

    Another program's model is imported, into `runs` or, without keeping it, into `temp_dir`.

    Raises:
        UserError: if the checkpoint is damaged, or does not match an explicit flag.
    """
    config = _with_input_options_of_run(config, explicit)
    if not config.init_from:
        if config.preset == FINETUNE:
            raise UserError(
                f"--preset {FINETUNE} needs --init_from: a run or checkpoint, a Hugging Face GPT-2 "
                "(name or folder), or nanoGPT's ckpt.pt"
            )
        return config
    try:
        if run_file_values(config).get("init_from") != config.init_from:  # a run has imported it
            source = import_if_needed(config.init_from, temp_dir=temp_dir)
            config = dataclasses.replace(config, init_from=source)
        path = _initial_checkpoint(config)
    except UserError as error:
        flag = "--init_from " if str(error).startswith(config.init_from) else ""
        raise UserError(f"{flag}{error}") from None
    if reason := checkpoints.find_corruption(path, checkpoints.INFERENCE_FILES):
        raise UserError(f"--init_from {config.init_from} is damaged: {reason}")
    pretrained = checkpoints.read_config(path)
    for name in sorted(MODEL_FIELDS.intersection(explicit)):
        requested, actual = getattr(config, name), getattr(pretrained, name)
        if requested != actual and (name, requested) != ("vocab_size", 0):
            raise UserError(
                f"--{name} {requested}, but the model of --init_from {config.init_from} has "
                f"{actual}: leave --{name} out"
            )
    fields = {name: getattr(pretrained, name) for name in MODEL_FIELDS if name not in explicit}
    if "tokenizer" not in explicit:
        fields["tokenizer"] = (path / checkpoints.TOKENIZER).as_posix()
    elif config.tokenizer == "bpe":
        raise UserError(
            f"--tokenizer bpe learns a vocabulary, and the model of --init_from {config.init_from} "
            "has its own: leave --tokenizer out"
        )
    elif config.tokenizer not in TEXT_DEPENDENT:
        # Fail before a long preparation; those that depend on the text are checked later.
        is_prepared = (Path(config.input) / INDEX_FILE).is_file()
        prepared_path = config.input if is_prepared else ""
        check_tokenizer(config, from_name(config.tokenizer, ""), prepared_path=prepared_path)
    if "context_length" in explicit and config.context_length > pretrained.block_size:
        raise UserError(
            f"--context_length {config.context_length} is more than the {pretrained.block_size} "
            f"positions of the model of --init_from {config.init_from}: give "
            f"{pretrained.block_size} or less"
        )
    if "context_length" not in explicit:
        fields["context_length"] = min(config.context_length, pretrained.block_size)
    return dataclasses.replace(config, **fields)


def check_tokenizer(config: Config, tokenizer: Tokenizer, *, prepared_path: str = "") -> None:
    """Raise a UserError if a tokenizer, or that of shards, differs from that of `--init_from`."""
    if not config.init_from:
        return
    path = _initial_checkpoint(config) / checkpoints.TOKENIZER
    expected = checkpoints.read_tokenizer(path.parent)
    if expected.to_json() == tokenizer.to_json():
        return
    subject, fix = f"--tokenizer {config.tokenizer}", "leave --tokenizer out"
    if prepared_path:
        subject = f"{prepared_path} was prepared with a tokenizer that"
        fix = f"prepare the text again with --tokenizer {quote(path.as_posix())}"
    raise UserError(
        f"{subject} ({tokenizer.name}, {tokenizer.vocab_size:,} ids) is not the one of --init_from "
        f"{config.init_from} ({expected.name}, {expected.vocab_size:,} ids): the same ids would "
        f"mean something else; {fix}"
    )


def warn_if_memorized(config: Config, dataset: Dataset) -> None:
    """Warn if the run of `--init_from` was trained on text that is held out here."""
    if not config.init_from or not len(dataset.val) or last_checkpoint(config):
        return
    path = checkpoints.resolve_checkpoint(config.init_from)
    if not (path / checkpoints.STATE).exists():
        return  # another program's model
    val_fraction = checkpoints.read_config(path).val_fraction
    if known := dataset.known_to(checkpoints.read_state(path), val_fraction):
        logger.warning(
            f"warning: {config.init_from} was trained on {known}, and the held-out loss will be "
            "too low if that is held out here: take the same --input and --val_fraction, or a text "
            "that is new to it"
        )


def last_checkpoint(config: Config) -> Path | None:
    """The checkpoint that a run in the run folder would resume from; None for a new run."""
    if config.restart:
        return None
    store = CheckpointStore(Path(resolve_out_dir(config)) / "checkpoints")
    # A copied run, or one that crashed in its first save, may lack the link.
    return store.read_link("last") or next(reversed(store.checkpoints()), None)


def _saved_config(config: Config, *needed: str) -> tuple[Path, Config] | None:
    """The checkpoint to resume from and its configuration, if they and `needed` are intact.

    Before there is a checkpoint, the configuration is in the folder of a run whose teachers have
    begun.
    """
    path = last_checkpoint(config)
    if path is not None:
        if checkpoints.find_corruption(path, (checkpoints.CONFIG, *needed)):
            return None
    else:
        path = Path(resolve_out_dir(config))
        has_started = (path / TEACHERS).is_dir() and (path / checkpoints.CONFIG).is_file()
        if config.restart or needed or not has_started:
            return None
    return path, checkpoints.read_config(path, with_model=False)


def config_of_run(config: Config) -> Config | None:
    """The configuration of a run with the same preset in the run folder, to resume it."""
    _, old = _saved_config(config) or (None, None)
    return old if old and old.preset == config.preset else None


def is_set_by_run_file(config: Config) -> bool:
    """Whether `--config` is the file of a run, which sets every field: the preset chooses none."""
    values = run_file_values(config)
    if values and values.get("preset") != config.preset:
        logger.info(
            f"note: --config {config.config} sets every value, and --preset {config.preset} "
            "changes none: to take the preset's values, leave --config out"
        )
    return bool(values)


def _initial_checkpoint(config: Config) -> Path:
    """The run's checkpoint, which has its shape and tokenizer, else that of `--init_from`."""
    return last_checkpoint(config) or checkpoints.resolve_checkpoint(config.init_from)


def _with_input_options_of_run(config: Config, explicit: Collection[str]) -> Config:
    """Read the files as the run in the run folder does, with its tokenizer if that file is gone."""
    if (saved := _saved_config(config)) is None:
        return config
    last, old = saved
    name = config.tokenizer
    is_gone = name not in NAMES and not Path(name).exists() and name == old.tokenizer
    if is_gone and not checkpoints.find_corruption(last, (checkpoints.TOKENIZER,)):
        copy = (last / checkpoints.TOKENIZER).as_posix()
        logger.info(f"note: {name} does not exist any more: using the run's copy, {copy}")
        config = dataclasses.replace(config, tokenizer=copy)
    names = {"field", "kind", "split_by_name"}.difference(explicit)
    return dataclasses.replace(config, **{name: getattr(old, name) for name in names})


def _learned_by_run(config: Config) -> Tokenizer | None:
    """The tokenizer that the run in the run folder learned from its text with `--tokenizer bpe`.

    Learning again gives the same one only with the same version of the package tokenizers.
    """
    if config.tokenizer != "bpe":
        return None
    last, old = _saved_config(config, checkpoints.TOKENIZER) or (None, None)
    return checkpoints.read_tokenizer(last) if last and old and old.tokenizer == "bpe" else None


def _vocab_size(config: Config, explicit: Collection[str], minimum: int) -> int:
    """`--vocab_size`; 0 instead of the run's if that is too small for another tokenizer.

    The run then refuses to resume with that tokenizer, which the user did set.
    """
    is_of_run = "vocab_size" not in explicit and _saved_config(config) is not None
    return 0 if is_of_run and config.vocab_size < minimum else config.vocab_size


def load_dataset(config: Config, explicit: Collection[str], progress: ProgressMeter) -> Dataset:
    """Open the text of `--input`, preparing it if needed, and check that it can be trained on.

    Raises:
        UserError: if it cannot be read or trained on.
    """
    is_finetuning = bool(config.init_from)
    options = DatasetOptions(
        tokenizer=_learned_by_run(config) or config.tokenizer,
        vocab_size=_vocab_size(config, explicit, MIN_VOCAB_SIZE),
        val_fraction=config.val_fraction,
        text_format=TextFormat(config.field, config.encoding),
        kind=config.kind,
        split_by_name=config.split_by_name,
        raw_bin=config.raw_bin,
        require_tokenizer="tokenizer" in explicit or is_finetuning,
        model_tokenizer=config.tokenizer if is_finetuning and "tokenizer" not in explicit else "",
        require_val_fraction="val_fraction" in explicit,
    )
    name = config.input
    if "input" not in explicit and may_be_bundled_input(name):
        logger.info(f"note: {name} does not exist here: using the bundled text, {BUNDLED_INPUT}")
        name = BUNDLED_INPUT
    elif "input" not in explicit and run_file_values(config) and _has_vanished(name):
        raise UserError(
            f"{name}, the text of the run, is not here: put it back, or give its path with --input"
        )
    dataset = open_dataset(resolve_input(name), options, progress=progress)
    check_length(dataset, config.context_length, random_offset=config.random_offset)
    for finding in quick_check(
        dataset, context_length=config.context_length, global_batch=config.global_batch_size
    ):
        if finding.level == "error":
            raise UserError(str(finding))
        if finding.level == "warning":
            logger.warning(f"warning: {finding}")
    return dataset


def _has_vanished(name: str) -> bool:
    is_path = name not in ("", BUNDLED_INPUT) and not glob.has_magic(name)
    return is_path and not Path(name).exists()


def resolve_config(config: Config, dataset: Dataset, explicit: Collection[str]) -> Config:
    """Fill in vocabulary size, run folder, and how the text was found.

    Raises:
        UserError: if `--vocab_size` is too small for the tokenizer.
    """
    num_ids = dataset.tokenizer.vocab_size
    vocab_size = _vocab_size(config, explicit, num_ids) or -(-num_ids // 64) * 64
    if vocab_size < num_ids:
        raise UserError(
            f"--vocab_size {vocab_size} is less than the {num_ids} ids of --tokenizer "
            f"{config.tokenizer}: give {num_ids} or more, or 0 for as many as it needs"
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
    """The run folder: `--out_dir`, or one named after the preset and the text of `--input`.

    Earlier versions left the name of the text out: their runs of the same text are found.
    """
    if config.out_dir:
        return config.out_dir
    preset = config.preset or "custom"
    old, new = f"runs/{preset}", f"runs/{folder_name(config)}"
    has_old_run = is_run_of(Path(old), preset, config.input)
    return old if has_old_run and not (Path(new) / checkpoints.CONFIG).exists() else new


def folder_name(config: Config) -> str:
    """The name of the preset, after that of the text of `--input`, for a folder."""
    preset, text = config.preset or "custom", ""
    if config.input not in ("", BUNDLED_INPUT) and not is_pipe(Path(config.input)):
        text = re.sub(r"[^\w.-]+", "-", Path(config.input).stem).strip("-.")
    return f"{text}-{preset}" if text else preset
