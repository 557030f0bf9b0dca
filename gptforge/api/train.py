"""`gptforge.train`: the command `train` with keyword arguments, callbacks and a `Run` as result."""

import dataclasses
import gc
import inspect
import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

from gptforge.api.console import (
    NotebookConsole,
    PythonConsole,
    errors_name_arguments,
    is_notebook,
)
from gptforge.api.run import Run
from gptforge.cli.parsing import preset_and_file
from gptforge.cli.train import run_training
from gptforge.config import Config, merge
from gptforge.data.cache import Texts, store_texts
from gptforge.device import default_torch_settings
from gptforge.errors import RunError, UserError
from gptforge.printable import safe_print
from gptforge.report.log_handler import log_to
from gptforge.report.metrics import Event
from gptforge.shell import Start
from gptforge.sweep.space import format_value
from gptforge.training.signals import EXIT_CODES
from gptforge.training.trainer import Trainer

P = ParamSpec("P")
Callback = Callable[[Event], object]
NAME_MAX = 255
"""Characters of a file name; a longer `input` is text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments(Config):
    """Arguments of `train`: the fields of `Config` and these."""

    input: str | Path = ""  # type: ignore[assignment]
    tokenizer: str | Path = Config.tokenizer  # type: ignore[assignment]
    init_from: str | Path = ""  # type: ignore[assignment]
    out_dir: str | Path = ""  # type: ignore[assignment]

    text: Texts | None = None
    """What to train on, instead of the path `input`: a string, or documents, which are strings or
    the rows of a dataset with a column `field`."""
    on_step: Callback | None = None
    """Called with each train event of metrics.jsonl, every `log_every` steps."""
    on_eval: Callback | None = None
    """Called with each eval event of metrics.jsonl."""
    on_save: Callable[[Path], object] | None = None
    """Called with the folder of each checkpoint once it is complete."""


def _with_arguments_of(
    cls: Callable[P, object],
) -> Callable[[Callable[..., Run]], Callable[P, Run]]:
    """Declare the keyword arguments of a function: for editors, mypy, help() and notebooks."""

    def decorate(function: Callable[..., Run]) -> Callable[P, Run]:
        signature = inspect.signature(cls).replace(return_annotation=Run)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


@_with_arguments_of(TrainArguments)
def train(
    *,
    text: Texts | None = None,
    on_step: Callback | None = None,
    on_eval: Callback | None = None,
    on_save: Callable[[Path], object] | None = None,
    **fields: Any,
) -> Run:
    """Train a model, or resume a run, as the command `gptforge train` does.

    Arguments have the names of the flags. Those left out, or None, have the values of the TOML file
    `config`, of `preset`, or their defaults. Ctrl-C, or an interrupt of a notebook's kernel, saves
    before it raises; the same call resumes. So does an exception in a callback.

    Returns:
        The run; it is finished, or has reached `time_limit`.

    Raises:
        UserError: for an invalid value, text or run folder, before anything runs.
        RunError: if the run cannot continue: no disk, no memory, no finite loss.
        KeyboardInterrupt: after an interrupt; the message says how to resume.
        SystemExit: after SIGTERM.
    """
    start_time = time.monotonic()
    observer = _Observer({"train": on_step, "eval": on_eval, "save": on_save})
    with errors_name_arguments():
        if "resume" in fields:
            raise UserError(
                "gptforge.train: there is no field 'resume': the same call resumes a run, and "
                "config='RUN/config.toml', out_dir='RUN' resumes any run"
            )
        for name, callback in (("on_step", on_step), ("on_eval", on_eval), ("on_save", on_save)):
            if not (callback is None or callable(callback)):
                raise UserError(f"gptforge.train: {name} takes a function, not {callback!r}")
        values = _plain_values(fields)
        merge(Config(), values, source="gptforge.train")  # checks names and types
        base, from_file = preset_and_file(values.get("preset", ""), values.get("config", ""))
        config = merge(base, values, source="gptforge.train")
        if text is not None:
            if "input" in values:
                raise UserError("input and text are both set: leave one out")
            path = store_texts(text, field=config.field).as_posix()
            config = dataclasses.replace(config, input=path, encoding="utf-8", kind="auto")
            values = {k: v for k, v in values.items() if k not in ("encoding", "kind")}
            values["input"] = path
        flags = (f"--{name}={format_value(value)}" for name, value in values.items())
        with default_torch_settings():
            reason, out_dir, _ = run_training(
                config,
                frozenset(values) | from_file,
                start=Start("gptforge", shlex.join(flags), start_time),
                logging_as=log_to(PythonConsole().log),
                on_built=observer.attach,
            )
    gc.collect()  # frees the trainer's memory on the device
    if observer.error is not None:
        raise observer.error
    values.pop("restart", None)
    call = f"gptforge.train({', '.join(f'{name}={value!r}' for name, value in values.items())})"
    if reason == "interrupted":
        raise KeyboardInterrupt(f"all is saved; resume with {call}")
    if reason == "terminated":
        safe_print(f"All is saved; resume with {call}")
        raise SystemExit(EXIT_CODES["terminated"])
    folder = observer.from_here(out_dir)
    if not (folder / "checkpoints").is_dir():
        raise RunError(f"time_limit was reached while a teacher trained; resume with {call}")
    return Run(folder)


def _plain_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out None, and convert paths and NumPy's numbers."""
    values = {}
    for name, value in fields.items():
        is_home = isinstance(value, str) and value.startswith("~/")
        if isinstance(value, os.PathLike) or is_home:
            values[name] = Path(value).expanduser().as_posix()
        elif value is not None:
            values[name] = value.item() if getattr(value, "ndim", 1) == 0 else value
    path = values.get("input", "")
    if not isinstance(path, str) or "\n" in path or max(map(len, path.split("/"))) > NAME_MAX:
        raise UserError("input takes a path: give a string or a dataset to train on as text")
    return values


class _Observer:
    """Calls callbacks with events until one raises an error, which stops training."""

    def __init__(self, callbacks: Mapping[str, Callable[[Any], object] | None]) -> None:
        self._callbacks = callbacks
        self.error: BaseException | None = None
        self._cwd = Path.cwd()

    def from_here(self, out_dir: str) -> Path:
        """The run folder, also after a callback has changed the working directory."""
        return Path(out_dir) if Path.cwd() == self._cwd else self._cwd / out_dir

    def attach(self, trainer: Trainer) -> None:
        """Observe a trainer that has not started; a teacher's events are not passed on."""
        self._stop_signal, report = trainer.stop_signal, trainer.report
        self._stop_signal.exits_on_second = False  # it would end the notebook's kernel
        if report.is_teacher:
            return
        self._out_dir = trainer.config.out_dir
        if trainer.comm.is_main:
            report.observers.append(self._on_event)
            report.console = PythonConsole(trainer.config.max_steps, trainer.state.step)
            if is_notebook():
                report.console = console = NotebookConsole(report.run_dir)
                report.observers.append(console.on_event)

    def _on_event(self, event: Event) -> None:
        kind = event["event"]
        callback = self._callbacks.get(kind)
        if callback is None or self.error is not None:
            return
        try:
            saved = self.from_here(self._out_dir) / "checkpoints" / event.get("checkpoint", "")
            callback(saved if kind == "save" else event)
        except BaseException as error:
            self.error = error
            self._stop_signal.request(f"{type(error).__name__} in a callback")
