"""The models of a run by checkpoint."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path

from gptforge.checkpoint.store import CheckpointStore
from gptforge.errors import UserError
from gptforge.files import real_path
from gptforge.inference.language_model import LanguageModel

MAX_LOADED_MODELS = 2  # as many as a page compares


class ModelCache:
    """Models of a run by checkpoint, loaded on first use; the least recently used is dropped."""

    def __init__(self, load: Callable[[str], LanguageModel], run: str) -> None:
        self._load = functools.lru_cache(MAX_LOADED_MODELS)(load)
        self._run, self._store = run, CheckpointStore(Path(run) / "checkpoints")
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The checkpoints: best and last, then the steps, newest first."""
        links = [link for link in ("best", "last") if self._store.read_link(link)]
        steps = [path.name for path in reversed(self._store.checkpoints())]
        return [*links, *steps] or [Path(self._run).name]

    def target(self, name: str) -> str:
        """The checkpoint that `best` or `last` is now; other names stay as they are."""
        path = self._store.read_link(name)
        return path.name if path else name

    def get(self, name: str) -> LanguageModel:
        """The model of one of `names`; a UserError if it is gone or damaged."""
        if name not in self.names():
            raise UserError(f"there is no checkpoint {name} here any more: choose another")
        path = self._store.folder / self.target(name)
        with self._lock:  # or two requests would load the same model
            return self._load(str(real_path(path) if path.is_dir() else Path(self._run)))
