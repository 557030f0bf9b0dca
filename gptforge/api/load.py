"""`gptforge.load`: loads a model, with errors that name arguments instead of flags."""

from gptforge.api.console import errors_name_arguments
from gptforge.builders import load_model

load = errors_name_arguments()(load_model.load)
