"""What training prints when it is started from Python: arguments instead of flags, and in a
notebook one output that is replaced."""

import contextlib
import html
import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typing_extensions import override

from gptforge.api.run import Run
from gptforge.config import FIELDS
from gptforge.errors import RunError, UserError
from gptforge.report.console import Console
from gptforge.report.metrics import Event
from gptforge.shell import shown

FLAG = re.compile(rf"`[^`]*`|--({'|'.join(FIELDS)})\b")
MAX_LINES, REFRESH_SECONDS = 12, 0.5


def as_arguments(message: str) -> str:
    """Write `--max_lr` as max_lr, except in commands between backticks."""
    return FLAG.sub(lambda match: match[1] or match[0], message)


@contextlib.contextmanager
def errors_name_arguments() -> Iterator[None]:
    """Replace flags in errors by arguments, as `as_arguments` does; also a decorator."""
    try:
        yield
    except (UserError, RunError) as error:
        error.args = (as_arguments(error.args[0]),)
        raise


class PythonConsole(Console):
    """Prints lines, or lines above a progress bar on a terminal."""

    @override
    def log(self, text: str) -> None:
        super().log(as_arguments(text))


class NotebookConsole(PythonConsole):
    """Shows the curves, from the first evaluation on, and the latest lines in one output."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        import IPython.display

        self._ipython: Any = IPython.display
        self._run_dir, self._curves = run_dir, ""
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._refresh_seconds, self._last_refresh = REFRESH_SECONDS, 0.0
        self._output = self._ipython.display(self._ipython.HTML(""), display_id=True)

    @override
    def log(self, text: str) -> None:
        self._lines.extend(as_arguments(text).splitlines())
        self._refresh()

    def on_event(self, event: Event) -> None:
        """Draw the curves after an evaluation."""
        if event["event"] == "eval":
            # Whatever matplotlib raises, training continues.
            with contextlib.suppress(Exception):
                self._curves = Run(shown(self._run_dir))._repr_html_()
            self._refresh()

    @override
    def __exit__(self, *_: object) -> None:
        self._refresh_seconds = 0.0  # few lines follow

    def _refresh(self) -> None:
        if time.monotonic() - self._last_refresh >= self._refresh_seconds:
            lines = html.escape("\n".join(self._lines))
            self._output.update(self._ipython.HTML(f"{self._curves}<pre>{lines}</pre>"))
            self._last_refresh = time.monotonic()


def is_notebook() -> bool:
    """Whether this is Jupyter, Colab or another program with an IPython kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
