"""From a run to a model in another program's form, and from there to a checkpoint."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptforge import __version__, files
from gptforge.builders.load_model import load_parts
from gptforge.checkpoint import store as checkpoints
from gptforge.config import (
    Config,
    merge,
    to_toml,
    validate,
)
from gptforge.convert.bundle import ModelBundle, unused_row_probability
from gptforge.convert.gguf import gelu_tanh_difference, write_gguf
from gptforge.convert.hf import (
    is_hf_dir,
    write_hf,
)
from gptforge.convert.model_card import (
    CURVES,
    METRICS,
    Origin,
    copy_run_file,
    example_prompt,
    model_card,
    one_line_description,
)
from gptforge.convert.space import write_space
from gptforge.errors import RunError, UserError, require_package
from gptforge.lock import atomic_create, atomic_create_dir
from gptforge.printable import MAX_NAME, printable
from gptforge.report.metrics import read_history
from gptforge.tokenizers.base import END_OF_TEXT

Say = Callable[[str], None]
MIN_REPORTED_PROBABILITY = 1e-4
"""Probability of an id without a token from which on an export says so."""


def export_hf(run: str, out: Path, *, log: Say) -> None:
    """Write a folder that transformers loads, after comparing logits."""
    require_package("transformers", extra="hf")
    parts, origin = load_parts(run), read_origin(run)
    usage = (
        "```python\nfrom transformers import pipeline\n\n"
        'write = pipeline("text-generation", model="this/folder")\n'
        f"print(write({example_prompt(parts.tokenizer)}, max_new_tokens=100)"
        '[0]["generated_text"])\n```'
    )
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    card = model_card(parts, origin, title=model_title(run), usage=usage, front_matter=front)
    with report_write_errors(out), atomic_create_dir(out) as folder:
        difference = write_hf(folder, parts, card=card)
        if origin and origin.curves:
            copy_run_file(origin.curves, folder)
    log(
        f"{out.as_posix()}: transformers' logits differ from ours by {difference:.1e} at most, "
        f"float32"
    )
    _say_which_row_ends(parts, log)


def export_gguf(run: str, out: Path, *, dtype: str, log: Say) -> None:
    """Write a file that llama.cpp loads, after reading it back and comparing logits."""
    require_package("gguf", extra="gguf")
    parts = load_parts(run)
    about = None if is_hf_dir(Path(run)) else checkpoints.read_config(_checkpoint_of(run))
    path = out if out.suffix == ".gguf" else out / f"model-{dtype}.gguf"
    _refuse_existing(path)
    title, line = model_title(run), one_line_description(parts, about)
    with report_write_errors(path), atomic_create(path) as scratch:
        difference = write_gguf(scratch, parts, outtype=dtype, name=title, description=line)
        _refuse_existing(path)
    log(
        f"{path.as_posix()}: logits read back differ from ours by {difference:.1e} at most, {dtype}"
    )
    if (share := unused_row_probability(parts)) > MIN_REPORTED_PROBABILITY:
        log(
            "note: the end-of-text id of the file is a spare row of the table, to which the model "
            f"gives up to {share:.1e} of the probability: longer training makes it less"
        )
    if off := gelu_tanh_difference(parts):
        log(
            "note: this model's activation is the exact GELU; llama.cpp computes GPT-2's in the "
            f"tanh form: its logits differ by up to {off:.1e} because of that; --to hf keeps it"
        )
    _say_which_row_ends(parts, log)


def _say_which_row_ends(parts: ModelBundle, say: Say) -> None:
    """Other programs want an end-of-text id; say which id serves as one, if none was learned."""
    tokenizer = parts.tokenizer
    if tokenizer.eot_token is None:
        is_spare = parts.config.vocab_size > tokenizer.vocab_size
        row = "a spare row of the embedding" if is_spare else "a row added to the embedding"
        say(
            f"note: the {tokenizer.name} tokenizer has no end-of-text id: {row} serves as "
            f"{END_OF_TEXT}, id {tokenizer.vocab_size}; the model has not learned to end a text"
        )


def export_space(run: str, out: Path, *, log: Say) -> None:
    """Write a folder that is a whole Hugging Face Space: the page, the program and the model."""
    parts, origin = load_parts(run), read_origin(run)
    with report_write_errors(out), atomic_create_dir(out) as folder:
        write_space(
            folder, parts, origin, title=model_title(run), config=config_toml(parts, origin)
        )
        back = load_parts(folder)
        if any(not t.equal(parts.state_dict[name]) for name, t in back.state_dict.items()):
            raise RunError("the weights in the Space are not those of the run: it was not kept")
    log(
        f"{out.as_posix()}: a Space with the same weights, bit for bit; try it: python app.py there"
    )


def read_origin(run: str) -> Origin | None:
    """What the run folder around a checkpoint tells; None for a model from elsewhere.

    Raises:
        UserError: for a link in the run folder: what it leads to would get into the export.
    """
    if is_hf_dir(Path(run)):
        return None
    path = _checkpoint_of(run)
    step = path.name.removeprefix("step-").partition(".")[0]
    folder = path.parent.parent
    if path.parent.name != "checkpoints" or not step.isdecimal():
        return None
    picture, metrics = folder / CURVES, folder / METRICS
    for file in (picture, metrics):
        if kind := files.nonregular_kind(file, follow_symlinks=False):
            raise UserError(
                f"{file.as_posix()} is {kind}, and not copied into an export: remove it, or put "
                "the file itself there"
            )
    return Origin(
        config=checkpoints.read_config(path),
        step=int(step),
        history=read_history(metrics),
        curves=picture if picture.is_file() else None,
    )


def _checkpoint_of(run: str) -> Path:
    """The checkpoint folder that is exported; a UserError if only a link in the run leads to it."""
    path = checkpoints.resolve_checkpoint(run).absolute()
    if path.is_symlink():
        # Such as `best`, named by whoever gave the command.
        path = path.resolve()
    if path.parent.name == "checkpoints" and path.parent.is_symlink():
        raise UserError(
            f"{path.parent.as_posix()} is a link, and what it leads to may not be this run's: name "
            f"the checkpoint that you want, {path.resolve().as_posix()}"
        )
    return path


def model_title(run: str) -> str:
    """A name for a model: that of its run folder."""
    path = files.real_path(run)
    inside = path.parent.name == "checkpoints"
    return printable((path.parent.parent if inside else path).name, MAX_NAME)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path.as_posix()} is there already: choose another name or remove it")


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Say in one line why `out` could not be written; whoever writes it removes what is half done.

    Raises:
        RunError: for a disk that is full, failing or not ours to write to.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise RunError(
            f"{out.as_posix()} could not be written ({why}): give a place with room where you may "
            "write; nothing of it is kept, and what it was made from is untouched"
        ) from error


def config_toml(parts: ModelBundle, origin: Origin | None, *, source: str = "") -> str:
    if origin:
        return to_toml(origin.config, {"gptforge": __version__})
    shape = vars(parts.config) | {"dropout": 0.0}
    own = {"tokenizer": parts.tokenizer.name, "context_length": parts.config.block_size}
    config = merge(Config(), {**shape, **own}, source="import")
    validate(config)
    return to_toml(config, {"gptforge": __version__, "command": "import", "source": source})
