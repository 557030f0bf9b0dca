"""Text generation for visitors, with limits so that none of them blocks or exhausts the page."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptforge.checkpoint.store import CheckpointStore
from gptforge.errors import UserError
from gptforge.files import real_path
from gptforge.inference.language_model import LanguageModel, Token
from gptforge.inference.sampling import SamplingParams
from gptforge.inference.validation import normalize_prompt

MAX_PROMPT_CHARS = 4000
MAX_NEW_TOKENS = 1000
MAX_SECONDS = 60.0
MAX_CONCURRENT = 2
"""Texts that are generated at the same time; the others wait in the queue."""
MAX_QUEUED = 24
MAX_LOADED_MODELS = 2
FRAME_SECONDS = 0.08
"""Between updates of a growing text."""


@dataclass(frozen=True)
class GenerationProgress:
    """A text so far."""

    tokens: list[Token]
    seconds: float
    is_done: bool
    note: str = ""
    """For the visitor: the context window shifted, or the time limit was reached."""


class ModelCache:
    """Models of a run by checkpoint, loaded on first use; the least recently used is dropped."""

    def __init__(self, load: Callable[[str], LanguageModel], run: str) -> None:
        self._load, self._run = load, run
        self._models: OrderedDict[str, LanguageModel] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The checkpoints: best and last, then the steps, newest first."""
        store = CheckpointStore(Path(self._run) / "checkpoints")
        links = [link for link in ("best", "last") if store.read_link(link)]
        steps = [path.name for path in reversed(store.checkpoints())]
        return [*links, *steps] or [Path(self._run).name]

    def get(self, name: str) -> LanguageModel:
        """The model of one of `names`; a UserError if it is gone or damaged."""
        if name not in self.names():
            raise UserError(f"there is no checkpoint {name} here any more: choose another")
        store = CheckpointStore(Path(self._run) / "checkpoints")
        # The targets of best and last change during training.
        path = store.read_link(name) or store.folder / name
        key = str(real_path(path) if path.is_dir() else Path(self._run))
        with self._lock:
            if key not in self._models:
                self._models[key] = self._load(key)
            self._models.move_to_end(key)
            while len(self._models) > MAX_LOADED_MODELS:
                self._models.popitem(last=False)
            return self._models[key]


def generate_with_limits(
    model: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int,
    params: SamplingParams,
    seed: int,
    max_seconds: float = MAX_SECONDS,
) -> Iterator[GenerationProgress]:
    """The text so far, several times per second, until it is complete or the time is up."""
    prompt = normalize_prompt(prompt)
    if len(prompt) > MAX_PROMPT_CHARS:
        raise UserError(f"the prompt has {len(prompt):,} characters, at most {MAX_PROMPT_CHARS:,}")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise UserError(f"{max_new_tokens} tokens: give 1 to {MAX_NEW_TOKENS}")
    context = model.model.config.block_size
    note = ""
    if len(model.encode_prompt(prompt)) + max_new_tokens > context:
        note = f"beyond the model's {context} tokens of context the oldest are forgotten"
    start = last_update = time.monotonic()
    tokens: list[Token] = []
    for token in model.stream_tokens(prompt, max_new_tokens, params, seed=seed):
        tokens.append(token)
        now = time.monotonic()
        if now - start > max_seconds:
            note = f"stopped after {max_seconds:.0f} seconds, the limit for one text"
            break
        if now - last_update >= FRAME_SECONDS:
            last_update = now
            yield GenerationProgress(tokens, now - start, is_done=False)
    yield GenerationProgress(tokens, time.monotonic() - start, is_done=True, note=note)
