"""GPT-Forge: train GPT-2 on any text, on any machine.

`import gptforge; run = gptforge.train(input="book.txt")` trains,
`gptforge.load("runs/shakespeare-cpu").generate("Romeo:")` generates text.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gptforge.errors import RunError, UserError

if TYPE_CHECKING:
    from gptforge.api.load import load
    from gptforge.api.run import Run
    from gptforge.api.train import train

__version__ = "0.2.0"
__all__ = ["Run", "RunError", "UserError", "__version__", "load", "train"]


# Lazy, since importing torch takes a second and `--help` does not need it.
_MODULES = {"load": "api.load", "Run": "api.run", "train": "api.train"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'gptforge' has no attribute '{name}'")
    return getattr(importlib.import_module(f"gptforge.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
