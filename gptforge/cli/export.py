"""`gptforge export` and `gptforge import`: models to and from other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gptforge.cli.parsing import parse_args
from gptforge.errors import UserError
from gptforge.printable import print_stderr, safe_print
from gptforge.report.log_handler import log_to


@dataclass(frozen=True)
class ExportArgs:
    """Write a model in another program's format, and check that its logits are the same."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run folder or checkpoint folder."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Folder to create; for gguf a file that ends in .gguf, or a folder for it."""
    to: Literal["hf", "gguf", "space"]
    """hf: transformers; gguf: llama.cpp; space: a Hugging Face Space with the web page."""
    type: Literal["", "f32", "f16", "q8_0"] = ""
    """Dtype of the matrices in a gguf file; empty: f16."""
    push: str = ""
    """owner/name: also upload the folder to the Hugging Face Hub (hf and space)."""
    private: bool = False
    """Make the repository private, if it is new."""


@dataclass(frozen=True)
class ImportArgs:
    """Convert another program's GPT-2 to a checkpoint."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH_OR_ID")]
    """Folder of a transformers model, nanoGPT's ckpt.pt, or a name on the Hugging Face Hub."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """Checkpoint folder to create."""
    tokenizer: str = ""
    """gpt2, char, byte or a tokenizer.json; empty: the model's own."""
    text: str = ""
    """With --tokenizer char: the text that defines the vocabulary."""


@log_to(print_stderr)
def main(argv: list[str]) -> None:
    """`gptforge export`: write, check and optionally upload."""
    args = parse_args(ExportArgs, argv, "gptforge export")
    if args.push and args.to == "gguf":
        raise UserError("--push uploads folders: use it with --to hf or --to space")
    if args.private and not args.push:
        raise UserError("--private needs --push owner/name")
    if args.type and args.to != "gguf":
        raise UserError(f"--type {args.type} needs --to gguf; hf and space are float32")
    from gptforge.builders import export_model
    from gptforge.convert.hub import check_repo_id, push_to_hub

    if args.push:
        check_repo_id(args.push)
    out = Path(args.out)
    if args.to == "gguf":
        export_model.export_gguf(args.run, out, dtype=args.type or "f16")
        return
    write = export_model.export_hf if args.to == "hf" else export_model.export_space
    write(args.run, out)
    if args.push:
        repo_type: Literal["model", "space"] = "model" if args.to == "hf" else "space"
        safe_print(push_to_hub(out, args.push, repo_type=repo_type, private=args.private))


@log_to(print_stderr)
def import_main(argv: list[str]) -> None:
    """`gptforge import`: read, check, write."""
    args = parse_args(ImportArgs, argv, "gptforge import")
    from gptforge.builders.import_model import import_model

    import_model(args.source, Path(args.out), tokenizer=args.tokenizer, text=args.text)
