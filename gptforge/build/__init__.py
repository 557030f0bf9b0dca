"""The only room that turns a Config, or a run on the disk, into objects."""

from gptforge.build.trained import evaluate_run, load
from gptforge.build.training import build_trainer

__all__ = ["build_trainer", "evaluate_run", "load"]
