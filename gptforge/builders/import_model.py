"""Import a GPT-2 of another program as a checkpoint."""

import hashlib
import logging
import os
from pathlib import Path

from gptforge import files
from gptforge.builders.export_model import bundle_toml, report_write_errors
from gptforge.checkpoint import format as checkpoints
from gptforge.config_file import read_toml
from gptforge.convert.bundle import ModelBundle, check_finite
from gptforge.convert.hf import PYTORCH_WEIGHTS, is_hf_dir, model_files, read_hf
from gptforge.convert.hub import OPENAI_MODELS, download_model
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.data.prepare.scan import collect_alphabet
from gptforge.data.prepare.sources import open_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError
from gptforge.lock import atomic_create, atomic_create_dir
from gptforge.report.console import ProgressMeter
from gptforge.tokenizers import Tokenizer, from_name

logger = logging.getLogger(__name__)

MODEL_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf", ".json")
"""Suffixes of files, and not of models on the Hub."""
GELU_DIGEST_TAG = "activation gelu"
"""Part of a nanoGPT checkpoint's digest: version 0.1 imported its exact GELU as the tanh form, and
such an import is not reused."""


def import_model(source: str, out: Path, *, tokenizer: str = "", text: str = "") -> None:
    """Write another program's model as a checkpoint folder.

    Args:
        source: a transformers folder, nanoGPT's ckpt.pt, or a name on the Hugging Face Hub.
        out: the new checkpoint folder.
        tokenizer: `--tokenizer` of training; empty: the source's.
        text: file whose characters are the alphabet of `--tokenizer char`.

    Raises:
        UserError: if the source is no GPT-2, naming the first thing that does not match.
    """
    explicit, path = _explicit_tokenizer(tokenizer, text), _find_model(source)
    with report_write_errors(out), atomic_create_dir(out) as folder:
        bundle = _import(source, path, folder, explicit)
    _log_import(out, bundle)


def _import(source: str, path: Path, folder: Path, tokenizer: Tokenizer | None) -> ModelBundle:
    with ProgressMeter("importing") as meter:
        meter(0, 2, "reading the model")
        bundle = (read_nanogpt if path.is_file() else read_hf)(path, tokenizer=tokenizer)
        check_finite(bundle.state_dict, source)
        meter(1, 2, "writing")
        tensors = {checkpoints.MODEL: dict(bundle.state_dict)}
        config = bundle_toml(bundle, source=_digest(Path(source)))
        checkpoints.save_checkpoint(folder, tensors, tokenizer=bundle.tokenizer, config=config)
    return bundle


def _log_import(out: Path, bundle: ModelBundle) -> None:
    c, tokenizer = bundle.config, bundle.tokenizer
    logger.info(
        f"{out.as_posix()}: {c.n_layer} layers, {c.n_head} heads, n_embd {c.n_embd}, "
        f"{c.block_size} positions, activation {c.activation}, {tokenizer.name} tokenizer "
        f"with {tokenizer.vocab_size:,} ids; sample, eval, export and --init_from take it"
    )


def import_if_needed(source: str, *, temp_dir: Path | None = None) -> str:
    """Return the path of a checkpoint for `--init_from`, importing another program's model.

    Concurrent starts import once: the others wait. An import of something else under the same name
    is moved to a backup.

    Args:
        source: a run or checkpoint, returned as it is, or what `import_model` takes.
        temp_dir: where to import to, without keeping it; None: `runs/imported`.
    """
    path = Path(source)
    is_run = path.is_dir() and not is_hf_dir(path)
    is_hub_name = source.count("/") == 1 or source in OPENAI_MODELS
    is_link_file = path.is_file() and path.name in ("best", "last")
    if is_run or is_link_file or not (path.exists() or is_hub_name):
        return source
    name = source.strip("/.") or path.resolve().name  # of the working folder
    out = Path("runs") / "imported" / name.replace("/", "--").replace("\\", "--")
    if not _why_not_reusable(out, source):
        logger.info(f"--init_from {source}: imported before, using {out.as_posix()}")
        return out.as_posix()
    if temp_dir:
        import_model(source, temp_dir / out.name)
        return (temp_dir / out.name).as_posix()
    with report_write_errors(out), atomic_create(out, log=logger.info) as folder:
        if not (reason := _why_not_reusable(out, source)):
            logger.info(
                f"--init_from {source}: imported by another process, using {out.as_posix()}"
            )
            return out.as_posix()
        found = _find_model(source)
        folder.mkdir()
        bundle = _import(source, found, folder, None)
        if os.path.lexists(out):
            backup = files.move_to_backup(out, "old")
            logger.info(f"note: {out.as_posix()} {reason}: moved to {backup.as_posix()}")
    _log_import(out, bundle)
    return out.as_posix()


def _why_not_reusable(out: Path, source: str) -> str:
    """Why `out` is not an intact import of `source` as it is now; empty if it is."""
    if Path(source).exists():
        try:
            _, made_by = read_toml(out / checkpoints.CONFIG)
        except UserError:
            made_by = None  # missing or damaged: not an import
        if not made_by or made_by.get("source") != _digest(Path(source)):
            return f"came from another {source}"
    reason = checkpoints.find_corruption(out, checkpoints.INFERENCE_FILES)
    return f"is damaged ({reason})" if reason else ""


def _digest(source: Path) -> str:
    """SHA-256 over a model's files, whatever their folder is called; empty for one on the Hub."""
    paths = [source] if source.is_file() else model_files(source) if source.is_dir() else []
    text = "".join(f"{path.suffix} {files.sha256(path)} " for path in paths)
    if source.is_file():
        text += GELU_DIGEST_TAG
    return hashlib.sha256(text.encode()).hexdigest() if paths else ""


def _explicit_tokenizer(name: str, text: str) -> Tokenizer | None:
    if name == "char" and not text:
        raise UserError("--tokenizer char needs --text: the text with its characters")
    if name == "bpe":
        raise UserError("--tokenizer bpe: give the tokenizer.json that the model was trained with")
    if text and name != "char":
        raise UserError("--text goes with --tokenizer char")
    if not text:
        return from_name(name, "") if name else None
    with open_sources([text]) as sources:
        return from_name(name, collect_alphabet(sources, TextFormat(), skip_bad=False))


def _find_model(source: str) -> Path:
    """The file or folder of a model, downloaded if it is none here."""
    path = Path(source)
    if (kind := files.nonregular_kind(path)) and not path.is_dir():
        raise UserError(f"{source} is {kind}, not a regular file: save the model to a file first")
    if path.is_file():
        if path.suffix == ".gguf":
            raise UserError(f"{source}: GGUF is not read: import the model that it was made from")
        if path.suffix in (".safetensors", ".json") or path.match(PYTORCH_WEIGHTS):
            raise UserError(f"{source}: one file of a model: give the folder that it is in")
        return path
    if path.is_dir():
        if is_hf_dir(path):
            return path
        try:
            checkpoints.resolve_checkpoint(source)
        except UserError:
            raise UserError(f"{source} has no config.json: give a transformers folder") from None
        raise UserError(
            f"{source} is a model of this program already: sample, eval, export and --init_from "
            "take it as it is"
        )
    # A name on the Hub has one slash at most, and does not look like a path.
    has_path_syntax = source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source
    is_in_folder = len(path.parts) > 1 and path.parent.is_dir()
    is_file_name = len(path.parts) > 2 or path.suffix in MODEL_SUFFIXES
    if has_path_syntax or is_in_folder or is_file_name:
        raise UserError(
            f"{source} does not exist: give a transformers folder, nanoGPT's ckpt.pt, or a "
            "name on the Hugging Face Hub"
        )
    return download_model(source)
