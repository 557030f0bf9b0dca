"""The only package that turns a Config, or a saved run, into objects."""

from gptforge.builders.evaluate import evaluate_run
from gptforge.builders.load_model import load
from gptforge.builders.trainer import build_trainer

__all__ = ["build_trainer", "evaluate_run", "load"]
