"""Files of torch.save, checked before loading: what they would build, and how large."""

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptforge.checkpoint.state_dict import TIED_WEIGHT
from gptforge.errors import UserError

MAX_PICKLE = 4 * 2**20
"""Bytes of names and plain values; GPT-2 XL with its optimizer takes less than one million."""
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file of torch.save before it wrote zip archives."""
ALLOWED_GLOBALS = re.compile(
    r"collections\.OrderedDict"
    r"|torch\.[A-Z]\w*Storage"
    r"|torch\._utils\._rebuild_(tensor_v2|parameter)"
)
"""Names in the pickle of a state_dict of dense tensors. torch.load allows more, some of which can
allocate any amount of memory, such as a bytearray or a sparse tensor."""


def read_torch_file(path: Path, *, what: str) -> Any:
    """Load a file of tensors and plain values without running any code in it.

    `what` says in the UserError for anything else what the file should be.
    """
    check_torch_archive(path, what)
    try:
        # weights_only loads tensors and plain containers, and refuses to import anything else.
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        # Malformed bytes raise all kinds of errors, and the message may advise to trust the file.
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        raise unsafe_file_error(path, unknown[1] if unknown else "", what) from None


def check_torch_archive(path: Path, what: str) -> None:
    """Raise a UserError unless a file is intact, and loading it takes about as much memory as disk.

    The pickle's opcodes are only inspected, not run.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
                problem = "in the format of PyTorch before 1.6, which is not supported"
                hint = "use torch.load(..., weights_only=True) and save it again with torch.save"
                raise UserError(f"{path}: {problem}: {hint}")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path}: compressed, which torch.save never does")
            total, size = sum(entry.file_size for entry in entries), path.stat().st_size
            if total > size:
                raise UserError(f"{path}: it claims to hold {total:,} bytes, but has {size:,}")
            pickle = next(e for e in entries if e.filename.rpartition("/")[2] == "data.pkl")
            if pickle.file_size > MAX_PICKLE:
                names_size = f"{pickle.file_size:,} bytes of names and values"
                raise UserError(f"{path}: {names_size}, more than a checkpoint has")
            if damaged := _first_damaged(archive):
                raise UserError(f"{path}: {damaged} in it is damaged: copy the file once more")
            names = _globals(archive.read(pickle))
    except UserError:
        raise
    except zipfile.BadZipFile:
        raise UserError(f"{path}: not {what}, or incomplete: copy the file once more") from None
    except Exception as error:
        raise unsafe_file_error(path, "", what) from error
    for name in names:
        if not ALLOWED_GLOBALS.fullmatch(name):
            raise unsafe_file_error(path, name, what)


def _first_damaged(archive: zipfile.ZipFile) -> str | None:
    """The first entry that differs from its CRC-32, which torch.load does not check."""
    for entry in archive.infolist():
        if entry.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves it out
            entry.CRC = None  # type: ignore[assignment]
    return archive.testzip()


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a UserError if tensors are larger than their file: many may share a few bytes.

    The output layer does not count: it shares those of the embedding.
    """
    total = sum(t.numel() * t.element_size() for name, t in tensors.items() if name != TIED_WEIGHT)
    if total > (size := path.stat().st_size):
        raise UserError(f"{path}: the tensors have {total:,} bytes, but the file only {size:,}")


def unsafe_file_error(path: Path, name: str, what: str) -> UserError:
    """The error for a file with other content, such as the global `name`."""
    shown = f" (it names {name})" if name else ""
    return UserError(
        f"{path}: not {what}, or not only tensors and plain values{shown}: "
        "anything else could run code when loaded"
    )


def _globals(pickle: bytes) -> list[str]:
    """The classes and functions that a pickle names, with dots."""
    names = []
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif opcode.name in ("STACK_GLOBAL", "INST"):
            # torch.save writes none of these.
            names.append(str(argument or opcode.name))
    return names
