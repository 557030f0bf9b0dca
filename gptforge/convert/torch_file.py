"""A file of torch.save, looked at before it is loaded: what it would build, and how large."""

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptforge.errors import UserError

MAX_PICKLE = 4 * 2**20
"""Bytes of names and plain values; GPT-2 XL with its optimizer takes less than one million."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How torch.save began a file before it wrote archives."""
ALLOWED_GLOBALS = re.compile(
    r"collections\.OrderedDict"
    r"|torch\.[A-Z]\w*Storage"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
"""What a state_dict of dense tensors names. torch.load takes more, and some of that can be asked
for at any size, for example a bytearray or a sparse tensor."""


def read_torch_file(path: Path, *, what: str) -> Any:
    """What is in a file of tensors and plain values, read without running any code of it.

    Args:
        path: the file.
        what: what it should be, for errors.

    Raises:
        UserError: if it is something else, or holds more than tensors and plain values.
    """
    check_torch_archive(path, what)
    try:
        # weights_only reads tensors and plain containers, and refuses to import anything else.
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        # Its reader raises whatever strange bytes make it stumble over, and may advise to trust it.
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        raise unsafe_file_error(path, stranger[1] if stranger else "", what) from None


def check_torch_archive(path: Path, what: str) -> None:
    """Raise a UserError unless loading a file takes about as much memory as the file is long.

    No code of the file is run: its opcodes are only looked at.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
                raise UserError(
                    f"{path}: in the form of PyTorch before 1.6, which is not read: load it with "
                    "torch.load(..., weights_only=True) and save it again with torch.save"
                )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path}: compressed, which torch.save never does")
            total, size = sum(entry.file_size for entry in entries), path.stat().st_size
            if total > size:
                raise UserError(f"{path}: it says that it holds {total:,} bytes, and has {size:,}")
            pickled = next(e for e in entries if e.filename.rpartition("/")[2] == "data.pkl")
            if pickled.file_size > MAX_PICKLE:
                raise UserError(
                    f"{path}: {pickled.file_size:,} bytes of names and values, more than a "
                    "checkpoint has"
                )
            strangers = [
                name
                for name in _globals(archive.read(pickled))
                if not ALLOWED_GLOBALS.fullmatch(name)
            ]
    except UserError:
        raise
    except Exception as error:
        # Strange bytes make these readers stumble in many ways.
        raise unsafe_file_error(path, "", what) from error
    if strangers:
        raise unsafe_file_error(path, strangers[0], what)


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if tensors are larger than their file: many may share a few bytes."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > (size := path.stat().st_size):
        raise UserError(f"{path}: its tensors have {total:,} bytes, and the file {size:,}")


def unsafe_file_error(path: Path, stranger: str, what: str) -> UserError:
    """The error for a file that holds something else, by the first name that is not known."""
    named = f" (it names {stranger})" if stranger else ""
    return UserError(
        f"{path}: not {what}, or not of tensors and plain values alone{named}: "
        "anything else could run code when read"
    )


def _globals(pickled: bytes) -> list[str]:
    """The classes and functions that a pickle names, with dots."""
    found = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            found.append(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "INST"):
            # torch.save writes none of these.
            found.append(str(argument or opcode.name))
    return found
