"""The numbers that a launcher such as torchrun leaves in the environment."""

import os
from collections.abc import Mapping

from gptforge.errors import UserError
from gptforge.printable import short_repr


def env_int(name: str, default: int, env: Mapping[str, str] = os.environ) -> int:
    """A whole number, 0 or more, from an environment variable.

    Raises:
        UserError: if it is set to anything else.
    """
    word = env.get(name, str(default))
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise UserError(
            f"the environment variable {name} is {short_repr(word)}, not a whole number: unset it, "
            "or start several processes with torchrun"
        )
    return int(word)
