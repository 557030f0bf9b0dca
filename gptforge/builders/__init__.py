"""The only package that turns a Config, or a saved run, into objects."""

from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.load_model import load
from gptforge.builders.run_evaluation import evaluate_run

__all__ = ["build_trainer", "evaluate_run", "load"]
