"""Writing for visitors: bounded in every way, so that nobody blocks or exhausts the page."""

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
"""Characters."""
MAX_NEW_TOKENS = 1000
MAX_SECONDS = 60.0
MAX_CONCURRENT = 2
"""Visitors who are written for at the same time; the others wait their turn."""
MAX_QUEUED = 24
"""Visitors in the queue; one more is told to come back."""
MAX_LOADED_MODELS = 2
"""Checkpoints that stay in memory."""
FRAME_SECONDS = 0.08
"""Seconds between two pictures of a page that grows: smooth to the eye, easy on a phone."""


@dataclass(frozen=True)
class GenerationProgress:
    """How far a text is."""

    tokens: list[Token]
    seconds: float
    is_done: bool
    note: str = ""
    """What the reader should know: the window slid, the time was up."""


class ModelCache:
    """Models by checkpoint, loaded when first asked for; the least recently used one goes.

    Args:
        load: gives a model for a folder, and takes somewhere to say notes.
        run: the run that the page shows.
    """

    def __init__(
        self, load: Callable[[str, Callable[[str], None]], LanguageModel], run: str
    ) -> None:
        self._load, self._run = load, run
        self._models: OrderedDict[str, LanguageModel] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """What a visitor may choose: best and last, then the steps, newest first."""
        store = CheckpointStore(Path(self._run) / "checkpoints")
        named = [which for which in ("best", "last") if store.read_link(which)]
        return [*named, *(path.name for path in reversed(store.checkpoints()))] or [
            Path(self._run).name
        ]

    def get(self, name: str) -> LanguageModel:
        """The model of one of `names`.

        Raises:
            UserError: if there is no such checkpoint (any more), or it is damaged.
        """
        if name not in self.names():
            raise UserError(f"there is no checkpoint {name} here any more: choose another")
        store = CheckpointStore(Path(self._run) / "checkpoints")
        # What best and last lead to moves on while a run learns.
        path = store.read_link(name) or store.folder / name
        key = str(real_path(path) if path.is_dir() else Path(self._run))
        with self._lock:
            if key not in self._models:
                self._models[key] = self._load(key, lambda text: None)
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
    """The text so far, a few times a second; ends by itself when the time is up.

    Raises:
        UserError: for a prompt or settings beyond the bounds.
    """
    prompt = normalize_prompt(prompt)
    if len(prompt) > MAX_PROMPT_CHARS:
        raise UserError(f"{len(prompt):,} characters of prompt; {MAX_PROMPT_CHARS:,} are taken")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise UserError(f"{max_new_tokens} tokens; 1 to {MAX_NEW_TOKENS} can be had")
    context = model.model.config.block_size
    is_longer = len(model.encode_prompt(prompt)) + max_new_tokens > context
    remark = f"beyond the model's {context} tokens of context the beginning is forgotten"
    remark = remark if is_longer else ""
    begin = shown = time.monotonic()
    tokens: list[Token] = []
    for token in model.stream_tokens(prompt, max_new_tokens, params, seed=seed):
        tokens.append(token)
        now = time.monotonic()
        if now - begin > max_seconds:
            remark = f"stopped: {max_seconds:.0f} seconds are the most that one text may take"
            break
        if now - shown >= FRAME_SECONDS:
            shown = now
            yield GenerationProgress(tokens, now - begin, is_done=False)
    yield GenerationProgress(tokens, time.monotonic() - begin, is_done=True, note=remark)
