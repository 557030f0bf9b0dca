"""GPT-Forge: train a true GPT-2 from any text, on whatever machine you have.

`from gptforge import load; load("runs/shakespeare-cpu").generate("Romeo:")`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptforge.builders import load


__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: torch takes a second, and `--help` does without.
    if name == "load":
        from gptforge.builders import load

        return load
    raise AttributeError(f"module 'gptforge' has no attribute '{name}'")
