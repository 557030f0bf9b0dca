"""TODO"""

import hashlib
import os
import tomllib
from pathlib import Path

from gptforge import files
from gptforge.builders.export_model import Say, config_toml, report_write_errors
from gptforge.checkpoint import store as checkpoints
from gptforge.config import (
    METADATA_TABLE,
)
from gptforge.convert.bundle import ModelBundle
from gptforge.convert.hf import (
    PYTORCH_WEIGHTS,
    is_hf_dir,
    model_files,
    read_hf,
)
from gptforge.convert.hub import OPENAI_MODELS, download_model
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.data.prepare.scan import collect_alphabet
from gptforge.data.prepare.sources import open_sources
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError
from gptforge.lock import atomic_create, atomic_create_dir
from gptforge.tokenizers import Tokenizer, from_name

MODEL_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf", ".json")
"""How files are named, and no model on the Hub."""
GELU_DIGEST_TAG = "activation gelu"
"""Part of the digest of a nanoGPT checkpoint: earlier versions imported its exact GELU as the tanh
form, and such an import is not used again."""


def import_model(source: str, out: Path, *, tokenizer: str = "", text: str = "", log: Say) -> None:
    """A model of another program's into a checkpoint folder of ours.

    Args:
        source: a folder of transformers', nanoGPT's ckpt.pt, or a name on the Hugging Face Hub.
        out: the new checkpoint folder.
        tokenizer: as `--tokenizer` of a training; empty: what the source brings along.
        text: file whose characters are the alphabet of `--tokenizer char`.
        say: told what came in.

    Raises:
        UserError: if it is no GPT-2, naming the first thing that does not fit.
    """
    parts = _read_model(source, _explicit_tokenizer(tokenizer, text), log)
    with report_write_errors(out), atomic_create_dir(out) as folder:
        _write_checkpoint(folder, parts, source)
    _log_import(out, parts, log)


def _write_checkpoint(folder: Path, parts: ModelBundle, source: str) -> None:
    config = config_toml(parts, None, source=_digest(Path(source)))
    tensors = dict(parts.state_dict)
    checkpoints.save_inference_checkpoint(folder, tensors, tokenizer=parts.tokenizer, config=config)


def _log_import(out: Path, parts: ModelBundle, say: Say) -> None:
    c = parts.config
    say(
        f"{out.as_posix()}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "
        f"{c.block_size} positions, activation {c.activation}, {parts.tokenizer.name} tokenizer "
        f"with {parts.tokenizer.vocab_size:,} ids; sample, eval, export and --init_from take it"
    )


def import_if_needed(source: str, *, log: Say, temp_dir: Path | None = None) -> str:
    """What `--init_from` takes: a run or checkpoint as it is, else an import made for it.

    An import of something else by that name is moved aside. Several starts at once make one import:
    the others wait for it. With `scratch` an import that is not there yet is made in that folder,
    and not kept.
    """
    path = Path(source)
    looks_ours = path.is_dir() and not is_hf_dir(path)
    if looks_ours or (not path.exists() and source.count("/") != 1 and source not in OPENAI_MODELS):
        return source
    if path.is_file() and path.name in ("best", "last"):
        return source
    out = Path("runs") / "imported" / source.strip("/.").replace("/", "--").replace("\\", "--")
    if _is_import_of(out, path):
        log(f"--init_from {source}: as it was imported before, {out.as_posix()}")
        return out.as_posix()
    if temp_dir:
        import_model(source, temp_dir / out.name, log=log)
        return (temp_dir / out.name).as_posix()
    with report_write_errors(out), atomic_create(out, log=log) as folder:
        if _is_import_of(out, path):
            log(f"--init_from {source}: as another process imported it, {out.as_posix()}")
            return out.as_posix()
        parts = _read_model(source, None, log)
        folder.mkdir()
        _write_checkpoint(folder, parts, source)
        if os.path.lexists(out):
            why = _why_not_reusable(out, path, source)
            aside = files.move_to_backup(out, "old")
            log(f"note: {out.as_posix()} {why}: moved to {aside.as_posix()}")
    _log_import(out, parts, log)
    return out.as_posix()


def _is_import_of(out: Path, source: Path) -> bool:
    """Whether `out` is an intact import of what `source` holds now, or names on the Hub."""
    return out.is_dir() and not _why_not_reusable(out, source, "")


def _why_not_reusable(out: Path, source: Path, name: str) -> str:
    """Why `out` cannot be used as the import of `source`; empty if it can."""
    if source.exists() and _recorded_digest(out) != _digest(source):
        return f"came from another {name}"
    damage = checkpoints.find_corruption(out, checkpoints.INFERENCE_FILES)
    return f"is damaged ({damage})" if damage else ""


def _digest(source: Path) -> str:
    """SHA-256 over what is read of a model, whatever it is called; empty for one on the Hub."""
    found = [source] if source.is_file() else []
    if source.is_dir():
        found = model_files(source)
    whole = "".join(f"{path.suffix} {files.sha256(path)} " for path in found)
    if source.is_file():
        whole += GELU_DIGEST_TAG
    return hashlib.sha256(whole.encode()).hexdigest() if found else ""


def _recorded_digest(folder: Path) -> str:
    """The digest that an import noted; empty if there is none."""
    try:
        notes = tomllib.loads(files.read_text(folder / checkpoints.CONFIG))[METADATA_TABLE]
        return str(notes.get("source", ""))
    except Exception:
        # Whatever it is, nobody noted a digest there.
        return ""


def _explicit_tokenizer(name: str, text: str) -> Tokenizer | None:
    if name == "char" and not text:
        raise UserError("--tokenizer char needs --text: the text whose characters it knows")
    if text and name != "char":
        raise UserError("--text goes with --tokenizer char")
    if not text:
        return from_name(name, "") if name else None
    with open_sources([text]) as sources:
        return from_name(name, collect_alphabet(sources, TextFormat(), skip_bad=False))


def _is_gptforge_model(source: str) -> bool:
    try:
        checkpoints.resolve_checkpoint(source)
    except UserError:
        return False
    return True


def _looks_like_path(path: Path, source: str) -> bool:
    """Whether what is not here was meant as a path, not as a name on the Hub."""
    is_written_so = source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source
    is_inside = len(path.parts) > 1 and path.parent.is_dir()
    return is_written_so or is_inside or len(path.parts) > 2 or path.suffix in MODEL_SUFFIXES


def _read_model(source: str, tokenizer: Tokenizer | None, say: Say) -> ModelBundle:
    path = Path(source)
    if (kind := files.nonregular_kind(path)) and not path.is_dir():
        raise UserError(f"{source} is {kind}, not a regular file: save the model to a file first")
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{source}: GGUF is not read: import the model that it was made from")
    is_part = path.suffix in (".safetensors", ".json") or path.match(PYTORCH_WEIGHTS)
    if is_part and path.is_file():
        raise UserError(f"{source}: a part of a model: give the folder that it lies in")
    if path.is_file():
        return read_nanogpt(path, tokenizer=tokenizer)
    if path.is_dir():
        if _is_gptforge_model(source):
            raise UserError(
                f"{source} is a model of this program already: sample, eval, export and "
                "--init_from take it as it is"
            )
        if not is_hf_dir(path):
            raise UserError(f"{source} has no config.json: give a folder of transformers'")
        return read_hf(path, tokenizer=tokenizer)
    if _looks_like_path(path, source):
        raise UserError(
            f"{source} does not exist: give a folder of transformers', nanoGPT's ckpt.pt, or a "
            "name on the Hugging Face Hub"
        )
    return read_hf(download_model(source, log=say), tokenizer=tokenizer)
