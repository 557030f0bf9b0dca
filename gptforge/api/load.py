"""`gptforge.load`: loads a model, with errors that name arguments instead of flags."""

import functools
from typing import Any

from gptforge.api.console import as_arguments
from gptforge.builders import load_model
from gptforge.errors import UserError
from gptforge.inference.language_model import LanguageModel


@functools.wraps(load_model.load)
def load(*args: Any, **kwargs: Any) -> LanguageModel:  # noqa: D103
    try:
        return load_model.load(*args, **kwargs)
    except UserError as error:
        error.args = (as_arguments(error.args[0]),)
        raise
