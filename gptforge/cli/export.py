"""`gptforge export` and `gptforge import`: out to other programs, and in from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptforge.cli.flags import parse_args
from gptforge.errors import UserError
from gptforge.printable import print_stderr, safe_print


@dataclass(frozen=True)
class ExportArgs:
    """Write a model in another program's form, and check that it says the same."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder or checkpoint folder."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to make; for gguf a file that ends in .gguf, or a folder for it."""
    to: Literal["hf", "gguf", "space"]
    """hf: for transformers; gguf: for llama.cpp; space: a Hugging Face Space with the web page."""
    type: Literal["", "f32", "f16", "q8_0"] = ""
    """What gguf stores matrices in; empty: f16."""
    push: str = ""
    """owner/name: send the folder to the Hugging Face Hub as well (hf and space)."""
    private: bool = False
    """Make the repository private, if it is new."""


@dataclass(frozen=True)
class ImportArgs:
    """Make a checkpoint of another program's GPT-2."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH_OR_ID")]
    """Folder of transformers', nanoGPT's ckpt.pt, or a name on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Checkpoint folder to make."""
    tokenizer: str = ""
    """gpt2, char, byte or a tokenizer.json of ours; empty: what the model brings along."""
    text: str = ""
    """With --tokenizer char: the text whose characters it knows."""


def export(args: list[str]) -> int:
    """Parse, write, check, perhaps push; returns the exit code."""
    asked = parse_args(ExportArgs, args, "gptforge export")
    if asked.push and asked.to == "gguf":
        raise UserError("--push sends folders: use it with --to hf or --to space")
    if asked.private and not asked.push:
        raise UserError("--private goes with --push owner/name")
    if asked.type and asked.to != "gguf":
        raise UserError(f"--type {asked.type} goes with --to gguf; hf and space keep float32")
    from gptforge.builders import export_model
    from gptforge.convert.hub import check_repo_id, push_to_hub

    if asked.push:
        check_repo_id(asked.push)
    out = Path(asked.out)
    if asked.to == "gguf":
        export_model.export_gguf(asked.run, out, dtype=asked.type or "f16", log=print_stderr)
        return 0
    if asked.to == "hf":
        export_model.export_hf(asked.run, out, log=print_stderr)
        kind: Literal["model", "space"] = "model"
    else:
        export_model.export_space(asked.run, out, log=print_stderr)
        kind = "space"
    if asked.push:
        safe_print(push_to_hub(out, asked.push, repo_type=kind, private=asked.private))
    return 0


def import_(args: list[str]) -> int:
    """Parse, read, check, write; returns the exit code."""
    asked = parse_args(ImportArgs, args, "gptforge import")
    from gptforge.builders.import_model import import_model

    import_model(
        asked.source, Path(asked.out), tokenizer=asked.tokenizer, text=asked.text, log=print_stderr
    )
    return 0
