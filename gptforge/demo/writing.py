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
from gptforge.generate.language_model import LanguageModel, Token
from gptforge.generate.prompts import as_in_files
from gptforge.generate.sampling import Sampling

LONGEST_PROMPT = 4000
"""Characters."""
MOST_TOKENS = 1000
MOST_SECONDS = 60.0
AT_ONCE = 2
"""Visitors who are written for at the same time; the others wait their turn."""
WAITING = 24
"""Visitors in the queue; one more is told to come back."""
KEPT_MODELS = 2
"""Checkpoints that stay in memory."""
FRAME = 0.08
"""Seconds between two pictures of a page that grows: smooth to the eye, easy on a phone."""


@dataclass(frozen=True)
class Progress:
    """How far a text is."""

    tokens: list[Token]
    seconds: float
    is_done: bool
    remark: str = ""
    """What the reader should know: the window slid, the time was up."""


class Writers:
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
        named = [which for which in ("best", "last") if store.pointed(which)]
        return [*named, *(path.name for path in reversed(store.steps()))] or [Path(self._run).name]

    def get(self, name: str) -> LanguageModel:
        """The model of one of `names`.

        Raises:
            UserError: if there is no such checkpoint (any more), or it is damaged.
        """
        if name not in self.names():
            raise UserError(f"there is no checkpoint {name} here any more: choose another")
        store = CheckpointStore(Path(self._run) / "checkpoints")
        # What best and last lead to moves on while a run learns.
        path = store.pointed(name) or store.folder / name
        key = str(real_path(path) if path.is_dir() else Path(self._run))
        with self._lock:
            if key not in self._models:
                self._models[key] = self._load(key, lambda text: None)
            self._models.move_to_end(key)
            while len(self._models) > KEPT_MODELS:
                self._models.popitem(last=False)
            return self._models[key]


def write(
    model: LanguageModel,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    seconds: float = MOST_SECONDS,
) -> Iterator[Progress]:
    """The text so far, a few times a second; ends by itself when the time is up.

    Raises:
        UserError: for a prompt or settings beyond the bounds.
    """
    prompt = as_in_files(prompt)
    if len(prompt) > LONGEST_PROMPT:
        raise UserError(f"{len(prompt):,} characters of prompt; {LONGEST_PROMPT:,} are taken")
    if not 1 <= max_new_tokens <= MOST_TOKENS:
        raise UserError(f"{max_new_tokens} tokens; 1 to {MOST_TOKENS} can be had")
    context = model.model.config.block_size
    is_longer = len(model.prompt_ids(prompt)) + max_new_tokens > context
    remark = f"beyond the model's {context} tokens of context the beginning is forgotten"
    remark = remark if is_longer else ""
    begin = shown = time.monotonic()
    tokens: list[Token] = []
    for token in model.tokens(prompt, max_new_tokens, sampling, seed=seed):
        tokens.append(token)
        now = time.monotonic()
        if now - begin > seconds:
            remark = f"stopped: {seconds:.0f} seconds are the most that one text may take"
            break
        if now - shown >= FRAME:
            shown = now
            yield Progress(tokens, now - begin, is_done=False)
    yield Progress(tokens, time.monotonic() - begin, is_done=True, remark=remark)
