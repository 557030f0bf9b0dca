"""From a run to a model in another program's form, and from there to a checkpoint."""

import hashlib
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptforge import __version__, files
from gptforge.build.trained import open_parts
from gptforge.checkpoint import store as checkpoints
from gptforge.config import NOTES, Config, check, merge, to_toml
from gptforge.convert.card import (
    CURVES,
    METRICS,
    Origin,
    beginning,
    copy_own,
    description,
    model_card,
)
from gptforge.convert.extras import require
from gptforge.convert.gguf import activation_difference, write_gguf
from gptforge.convert.hf import OLDER_WEIGHTS, files_of_a_model, is_hf, read_hf, write_hf
from gptforge.convert.hub import OPENAI, fetch_model
from gptforge.convert.nanogpt import read_nanogpt
from gptforge.convert.parts import Parts, spare_row_probability
from gptforge.convert.space import fill_space
from gptforge.data.documents import Form
from gptforge.data.sources import open_sources
from gptforge.data.survey import alphabet
from gptforge.errors import RunError, UserError
from gptforge.holding import new_folder, new_path
from gptforge.printable import MAX_NAME, printable
from gptforge.report.metrics import read_history
from gptforge.tokenizers import Tokenizer, named
from gptforge.tokenizers.base import END_OF_TEXT

Say = Callable[[str], None]
WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".gguf", ".json")
"""How files are named, and no model on the Hub."""
FAINT = 1e-4
"""Probability of an id without a token from which on an export says so."""
GELU_IS_KEPT = "activation gelu"
"""Part of the digest of a nanoGPT checkpoint: earlier versions imported its exact GELU as the tanh
form, and such an import is not used again."""


def export_hf(run: str, out: Path, *, say: Say) -> None:
    """Write a folder that transformers loads, after comparing logits."""
    require("transformers", extra="hf")
    parts, origin = open_parts(run), origin_of(run)
    usage = (
        "```python\nfrom transformers import pipeline\n\n"
        'write = pipeline("text-generation", model="this/folder")\n'
        f"print(write({beginning(parts.tokenizer)}, max_new_tokens=100)"
        '[0]["generated_text"])\n```'
    )
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    card = model_card(parts, origin, title=title_of(run), usage=usage, front=front)
    with _writing(out), new_folder(out) as folder:
        difference = write_hf(folder, parts, card=card)
        if origin and origin.curves:
            copy_own(origin.curves, folder)
    say(
        f"{out.as_posix()}: transformers' logits differ from ours by {difference:.1e} at most, "
        f"float32"
    )
    _say_which_row_ends(parts, say)


def export_gguf(run: str, out: Path, *, kind: str, say: Say) -> None:
    """Write a file that llama.cpp loads, after reading it back and comparing logits."""
    require("gguf", extra="gguf")
    parts = open_parts(run)
    about = None if is_hf(Path(run)) else checkpoints.read_config(_checkpoint_of(run))
    path = out if out.suffix == ".gguf" else out / f"model-{kind}.gguf"
    _refuse_existing(path)
    title, line = title_of(run), description(parts, about)
    with _writing(path), new_path(path) as scratch:
        difference = write_gguf(scratch, parts, kind=kind, name=title, description=line)
        _refuse_existing(path)
    say(f"{path.as_posix()}: logits read back differ from ours by {difference:.1e} at most, {kind}")
    if (share := spare_row_probability(parts)) > FAINT:
        say(
            "note: the end-of-text id of the file is a spare row of the table, to which the model "
            f"gives up to {share:.1e} of the probability: longer training makes it less"
        )
    if off := activation_difference(parts):
        say(
            "note: this model's activation is the exact GELU; llama.cpp computes GPT-2's in the "
            f"tanh form: its logits differ by up to {off:.1e} because of that; --to hf keeps it"
        )
    _say_which_row_ends(parts, say)


def _say_which_row_ends(parts: Parts, say: Say) -> None:
    """Other programs want an end-of-text id; say which id serves as one, if none was learned."""
    tokenizer = parts.tokenizer
    if tokenizer.end_of_text is None:
        is_spare = parts.config.vocab_size > tokenizer.size
        row = "a spare row of the embedding" if is_spare else "a row added to the embedding"
        say(
            f"note: the {tokenizer.name} tokenizer has no end-of-text id: {row} serves as "
            f"{END_OF_TEXT}, id {tokenizer.size}; the model has not learned to end a text"
        )


def export_space(run: str, out: Path, *, say: Say) -> None:
    """Write a folder that is a whole Hugging Face Space: the page, the program and the model."""
    parts, origin = open_parts(run), origin_of(run)
    with _writing(out), new_folder(out) as folder:
        fill_space(folder, parts, origin, title=title_of(run), config=_config_text(parts, origin))
        back = open_parts(folder)
        if any(not t.equal(parts.tensors[name]) for name, t in back.tensors.items()):
            raise RunError("the weights in the Space are not those of the run: it was not kept")
    say(
        f"{out.as_posix()}: a Space with the same weights, bit for bit; try it: python app.py there"
    )


def import_model(source: str, out: Path, *, tokenizer: str = "", text: str = "", say: Say) -> None:
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
    parts = _read(source, _given_tokenizer(tokenizer, text), say)
    with _writing(out), new_folder(out) as folder:
        _write_import(folder, parts, source)
    _say_import(out, parts, say)


def _write_import(folder: Path, parts: Parts, source: str) -> None:
    config = _config_text(parts, None, source=_digest(Path(source)))
    tensors = dict(parts.tensors)
    checkpoints.write_model(folder, tensors, tokenizer=parts.tokenizer, config=config)


def _say_import(out: Path, parts: Parts, say: Say) -> None:
    c = parts.config
    say(
        f"{out.as_posix()}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "
        f"{c.block_size} positions, activation {c.activation}, {parts.tokenizer.name} tokenizer "
        f"with {parts.tokenizer.size:,} ids; sample, eval, export and --init_from take it"
    )


def imported(source: str, *, say: Say, scratch: Path | None = None) -> str:
    """What `--init_from` takes: a run or checkpoint as it is, else an import made for it.

    An import of something else by that name is moved aside. Several starts at once make one import:
    the others wait for it. With `scratch` an import that is not there yet is made in that folder,
    and not kept.
    """
    path = Path(source)
    looks_ours = path.is_dir() and not is_hf(path)
    if looks_ours or (not path.exists() and source.count("/") != 1 and source not in OPENAI):
        return source
    if path.is_file() and path.name in ("best", "last"):
        return source
    out = Path("runs") / "imported" / source.strip("/.").replace("/", "--").replace("\\", "--")
    if _is_import_of(out, path):
        say(f"--init_from {source}: as it was imported before, {out.as_posix()}")
        return out.as_posix()
    if scratch:
        import_model(source, scratch / out.name, say=say)
        return (scratch / out.name).as_posix()
    with _writing(out), new_path(out, say=say) as folder:
        if _is_import_of(out, path):
            say(f"--init_from {source}: as another process imported it, {out.as_posix()}")
            return out.as_posix()
        parts = _read(source, None, say)
        folder.mkdir()
        _write_import(folder, parts, source)
        if os.path.lexists(out):
            why = _why_another(out, path, source)
            aside = files.set_aside(out, "old")
            say(f"note: {out.as_posix()} {why}: moved to {aside.as_posix()}")
    _say_import(out, parts, say)
    return out.as_posix()


def _is_import_of(out: Path, source: Path) -> bool:
    """Whether `out` is an intact import of what `source` holds now, or names on the Hub."""
    return out.is_dir() and not _why_another(out, source, "")


def _why_another(out: Path, source: Path, name: str) -> str:
    """Why `out` cannot be used as the import of `source`; empty if it can."""
    if source.exists() and _imported_from(out) != _digest(source):
        return f"came from another {name}"
    damage = checkpoints.damage(out, checkpoints.TO_WRITE_WITH)
    return f"is damaged ({damage})" if damage else ""


def _digest(source: Path) -> str:
    """SHA-256 over what is read of a model, whatever it is called; empty for one on the Hub."""
    found = [source] if source.is_file() else []
    if source.is_dir():
        found = files_of_a_model(source)
    whole = "".join(f"{path.suffix} {files.sha256(path)} " for path in found)
    if source.is_file():
        whole += GELU_IS_KEPT
    return hashlib.sha256(whole.encode()).hexdigest() if found else ""


def _imported_from(folder: Path) -> str:
    """The digest that an import noted; empty if there is none."""
    try:
        notes = tomllib.loads(files.read_small(folder / checkpoints.CONFIG))[NOTES]
        return str(notes.get("source", ""))
    except Exception:
        # Whatever it is, nobody noted a digest there.
        return ""


def origin_of(run: str) -> Origin | None:
    """What the run folder around a checkpoint tells; None for a model from elsewhere.

    Raises:
        UserError: for a link in the run folder: what it leads to would get into the export.
    """
    if is_hf(Path(run)):
        return None
    path = _checkpoint_of(run)
    step = path.name.removeprefix("step-").partition(".")[0]
    folder = path.parent.parent
    if path.parent.name != "checkpoints" or not step.isdecimal():
        return None
    picture, metrics = folder / CURVES, folder / METRICS
    for file in (picture, metrics):
        if kind := files.irregular_kind(file, follow_symlinks=False):
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
    path = checkpoints.resolve(run).absolute()
    if path.is_symlink():
        # Such as `best`, named by whoever gave the command.
        path = path.resolve()
    if path.parent.name == "checkpoints" and path.parent.is_symlink():
        raise UserError(
            f"{path.parent.as_posix()} is a link, and what it leads to may not be this run's: name "
            f"the checkpoint that you want, {path.resolve().as_posix()}"
        )
    return path


def title_of(run: str) -> str:
    """A name for a model: that of its run folder."""
    path = files.real_path(run)
    inside = path.parent.name == "checkpoints"
    return printable((path.parent.parent if inside else path).name, MAX_NAME)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise UserError(f"{path.as_posix()} is there already: choose another name or remove it")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
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


def _config_text(parts: Parts, origin: Origin | None, *, source: str = "") -> str:
    if origin:
        return to_toml(origin.config, {"gptforge": __version__})
    shape = vars(parts.config) | {"dropout": 0.0}
    own = {"tokenizer": parts.tokenizer.name, "context_length": parts.config.block_size}
    config = merge(Config(), {**shape, **own}, source="import")
    check(config)
    return to_toml(config, {"gptforge": __version__, "command": "import", "source": source})


def _given_tokenizer(name: str, text: str) -> Tokenizer | None:
    if name == "char" and not text:
        raise UserError("--tokenizer char needs --text: the text whose characters it knows")
    if text and name != "char":
        raise UserError("--text goes with --tokenizer char")
    if not text:
        return named(name, "") if name else None
    with open_sources([text]) as sources:
        return named(name, alphabet(sources, Form(), skip_bad=False))


def _is_ours(source: str) -> bool:
    try:
        checkpoints.resolve(source)
    except UserError:
        return False
    return True


def _is_missing(path: Path, source: str) -> bool:
    """Whether what is not here was meant as a path, not as a name on the Hub."""
    is_written_so = source.startswith((".", "/", "~")) or source.endswith("/") or "\\" in source
    is_inside = len(path.parts) > 1 and path.parent.is_dir()
    return is_written_so or is_inside or len(path.parts) > 2 or path.suffix in WEIGHTS


def _read(source: str, tokenizer: Tokenizer | None, say: Say) -> Parts:
    path = Path(source)
    if (kind := files.irregular_kind(path)) and not path.is_dir():
        raise UserError(f"{source} is {kind}, not a regular file: save the model to a file first")
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{source}: GGUF is not read: import the model that it was made from")
    is_part = path.suffix in (".safetensors", ".json") or path.match(OLDER_WEIGHTS)
    if is_part and path.is_file():
        raise UserError(f"{source}: a part of a model: give the folder that it lies in")
    if path.is_file():
        return read_nanogpt(path, tokenizer=tokenizer)
    if path.is_dir():
        if _is_ours(source):
            raise UserError(
                f"{source} is a model of this program already: sample, eval, export and "
                "--init_from take it as it is"
            )
        if not is_hf(path):
            raise UserError(f"{source} has no config.json: give a folder of transformers'")
        return read_hf(path, tokenizer=tokenizer)
    if _is_missing(path, source):
        raise UserError(
            f"{source} does not exist: give a folder of transformers', nanoGPT's ckpt.pt, or a "
            "name on the Hugging Face Hub"
        )
    return read_hf(fetch_model(source, say=say), tokenizer=tokenizer)
