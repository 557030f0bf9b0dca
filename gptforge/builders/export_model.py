"""Export a model to the formats of other programs, checking that logits agree."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptforge import __version__, files
from gptforge.builders.load_model import SavedModel, load_saved
from gptforge.builders.prompts import suggest_prompts
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.out_dir import CURVES, METRICS, SAMPLES
from gptforge.config import Config, merge
from gptforge.config_checks import validate
from gptforge.config_file import to_toml
from gptforge.convert.bundle import ModelBundle, check_finite, unused_row_probability
from gptforge.convert.gguf import check_gguf, gelu_tanh_difference, write_gguf
from gptforge.convert.hf import check_hf, write_hf
from gptforge.convert.model_card import Origin, copy_run_file, model_card, one_line_description
from gptforge.convert.space import write_space
from gptforge.errors import RunError, UserError, explain_os_error, require_package
from gptforge.lock import atomic_create, atomic_create_dir
from gptforge.printable import MAX_NAME, printable
from gptforge.report.console import ProgressMeter
from gptforge.report.metrics import read_history
from gptforge.tokenizers.base import END_OF_TEXT

logger = logging.getLogger(__name__)

VERSION = {"gptforge": __version__}
MIN_REPORTED_PROBABILITY = 1e-4
"""Probability of an unused embedding row from which an export reports it."""


def export_hf(run: str, out: Path) -> None:
    """Write a folder that transformers loads, and compare the logits."""
    require_package("transformers", extra="hf")
    with ProgressMeter("exporting") as meter:
        meter(0, 3, "reading the model")
        saved = _load_finite(run)
        bundle, origin = saved.bundle, read_origin(saved)
        card = model_card(bundle, origin, title=model_title(run))
        meter(1, 3, "writing")
        with report_write_errors(out), atomic_create_dir(out) as folder:
            write_hf(folder, bundle, card=card)
            if origin and origin.curves:
                copy_run_file(origin.curves, folder)
            meter(2, 3, "comparing logits")
            difference = check_hf(folder, bundle)
    logger.info(
        f"{out.as_posix()}: logits in transformers differ from ours by at most {difference:.1e}, "
        "float32"
    )
    _log_eos_row(bundle)


def export_gguf(run: str, out: Path, *, dtype: str) -> None:
    """Write a file that llama.cpp loads, or a folder with it, read it back and compare the logits.

    The matrices are f32, f16 or q8_0.
    """
    require_package("gguf", extra="gguf")
    with ProgressMeter("exporting") as meter:
        meter(0, 3, "reading the model")
        saved = _load_finite(run)
        if saved.config is not None:
            _check_is_no_link(saved.path)
        bundle = saved.bundle
        path = out if out.suffix == ".gguf" or out.is_file() else out / f"model-{dtype}.gguf"
        meter(1, 3, "writing")
        with report_write_errors(path), atomic_create(path, is_new=True) as temp_path:
            name, description = model_title(run), one_line_description(bundle, saved.config)
            write_gguf(temp_path, bundle, outtype=dtype, name=name, description=description)
            meter(2, 3, "comparing logits")
            difference = check_gguf(temp_path, bundle, outtype=dtype)
    logger.info(
        f"{path.as_posix()}: logits read back differ from ours by at most {difference:.1e}, {dtype}"
    )
    if gelu_difference := gelu_tanh_difference(bundle):
        logger.info(
            "note: this model's activation is the exact GELU; llama.cpp computes GPT-2's in the "
            f"tanh form, which changes logits by up to {gelu_difference:.1e}; --to hf keeps it"
        )
    _log_eos_row(bundle)


def _load_finite(run: str) -> SavedModel:
    saved = load_saved(run)
    check_finite(saved.bundle.state_dict, run)
    return saved


def _log_eos_row(bundle: ModelBundle) -> None:
    """Other programs require an end-of-text id; say which row serves as one without a token."""
    tokenizer = bundle.tokenizer
    if (probability := unused_row_probability(bundle)) > MIN_REPORTED_PROBABILITY:
        logger.info(
            "note: the end-of-text id of the export is an unused row of the embedding, to which "
            f"the model gives a probability of up to {probability:.1e}, and other programs end a "
            "text there: longer training reduces it"
        )
    if tokenizer.eot_token is None:
        is_unused = bundle.config.vocab_size > tokenizer.vocab_size
        row = "an unused row of the embedding" if is_unused else "a row added to the embedding"
        logger.info(
            f"note: the {tokenizer.name} tokenizer has no end-of-text id: {row} serves as "
            f"{END_OF_TEXT}, id {tokenizer.vocab_size}; the model was not trained to end a text"
        )


def export_space(run: str, out: Path) -> None:
    """Write a complete Hugging Face Space: the web page, this program and the model."""
    with ProgressMeter("exporting") as meter:
        meter(0, 3, "reading the model")
        saved = _load_finite(run)
        bundle, origin = saved.bundle, read_origin(saved)
        run_config = origin.config if origin else None
        config = to_toml(run_config, VERSION) if run_config else bundle_toml(bundle)
        meter(1, 3, "writing")
        with report_write_errors(out), atomic_create_dir(out) as folder:
            title, prompts = model_title(run), suggest_prompts(run, run_config)
            write_space(folder, bundle, origin, title=title, prompts=prompts, config=config)
            meter(2, 3, "comparing weights")
            written = load_saved(folder).bundle.state_dict
            if any(not t.equal(bundle.state_dict[name]) for name, t in written.items()):
                raise RunError("the weights in the Space are not those of the run: it is not kept")
    logger.info(
        f"{out.as_posix()}: a Space with the same weights, bit for bit; try it: python app.py there"
    )


def bundle_toml(bundle: ModelBundle, *, source: str = "") -> str:
    """The config.toml of a model without a run; `source` is the digest of what it came from."""
    fields = {
        **vars(bundle.config),
        "dropout": 0.0,
        "tokenizer": bundle.tokenizer.name,
        "context_length": bundle.config.block_size,
    }
    config = merge(Config(), fields, source="import")
    validate(config)
    return to_toml(config, {**VERSION, "command": "import", "source": source})


def read_origin(saved: SavedModel) -> Origin | None:
    """Read what the run folder says about a checkpoint; None for a model without a run.

    Raises:
        UserError: for a link in the run folder, whose target would get into the export.
    """
    path = saved.path.absolute()
    if saved.config is None:
        return None
    _check_is_no_link(path)
    if not is_of_run(path):
        return None
    curves, metrics, samples = (path.parents[1] / name for name in (CURVES, METRICS, SAMPLES))
    for file in (curves, metrics, samples):
        if kind := files.nonregular_kind(file, follow_symlinks=False):
            raise UserError(
                f"{file.as_posix()} is {kind}, and not copied into an export: remove it, or put "
                "the file itself there"
            )
    history = read_history(metrics)
    if path.name != checkpoints.resolve_checkpoint(path.parents[1].as_posix()).name:
        history.final = None  # of the checkpoint that the run folder stands for
    if "." in path.name:
        # Evaluations of its step are of another checkpoint: its own steps were dropped.
        history.evals = [history.dropped_best] if history.dropped_best else []
    return Origin(
        config=saved.config,
        step=checkpoints.step_from_path(path),
        history=history,
        curves=curves if curves.is_file() else None,
    )


def is_of_run(path: Path) -> bool:
    """Whether a checkpoint is in the folder of a run."""
    is_named_by_step = checkpoints.LINK_TARGET.fullmatch(path.name) is not None
    return is_named_by_step and path.absolute().parent.name == "checkpoints"


def _check_is_no_link(path: Path) -> None:
    """Raise a UserError if a run has only a link to its checkpoints."""
    path = path.absolute()
    if path.parent.name == "checkpoints" and path.parent.is_symlink():
        raise UserError(
            f"{path.parent.as_posix()} is a link, and may lead to another run: name the "
            f"checkpoint that you want, {path.resolve().as_posix()}"
        )


def model_title(run: str) -> str:
    """Name a model after its run folder."""
    path = files.real_path(run)
    is_checkpoint = path.parent.name == "checkpoints"
    return printable((path.parent.parent if is_checkpoint else path).name, MAX_NAME)


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Turn a failure to write `out` into a RunError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, fix = explain_os_error(error)
        raise RunError(
            f"{out.as_posix()} could not be written ({reason}): {fix or 'choose another folder'}; "
            "nothing of it is kept, and the source is unchanged"
        ) from error
