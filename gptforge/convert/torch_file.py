"""Files that torch.save wrote, read without running any code that may be in them."""

import re
from pathlib import Path
from typing import Any

import torch

from gptforge.errors import UserError


def read_torch_file(path: Path, *, what: str) -> Any:
    """What is in a file of tensors and plain values.

    Args:
        path: the file.
        what: what it should be, for errors.

    Raises:
        UserError: if it is something else, or holds more than tensors and plain values.
    """
    try:
        # weights_only reads tensors and plain containers, and refuses to import anything else.
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        # Its reader raises whatever strange bytes make it stumble over, and may advise to trust it.
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        named = f" (it names {stranger[1]})" if stranger else ""
        raise UserError(
            f"{path}: not {what}, or not of tensors and plain values alone{named}: "
            "anything else could run code when read"
        ) from None
