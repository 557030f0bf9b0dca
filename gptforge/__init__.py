"""GPT-Forge: train GPT-2 on any text, on any machine.

`from gptforge import load; load("runs/shakespeare-cpu").generate("Romeo:")`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptforge.builders.load_model import load

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Lazy, since importing torch takes a second and `--help` does not need it.
    if name == "load":
        from gptforge.builders.load_model import load

        return load
    raise AttributeError(f"module 'gptforge' has no attribute '{name}'")
