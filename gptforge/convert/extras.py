"""Packages that training does without: asked for by name, with the command that brings them."""

import importlib.util

from gptforge.errors import UserError, install_hint


def require(package: str, *, extra: str) -> None:
    """Raise a UserError unless `package` is installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"this needs the package {package}, which is not installed: {install_hint(extra)}"
        )
