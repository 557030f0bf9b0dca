"""Findings about data or a machine: what it is, how bad, and the fix."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """Something found about data or a machine, how bad it is, and how to fix it."""

    level: Literal["good", "warning", "error"]
    message: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.message}: {self.fix}" if self.fix else self.message


def ok(message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("good", message)


def warning(message: str, fix: str = "") -> Finding:
    """Return a finding that work can continue with."""
    return Finding("warning", message, fix)


def error(message: str, fix: str = "") -> Finding:
    """Return a finding that must be fixed first."""
    return Finding("error", message, fix)
