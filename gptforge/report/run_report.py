"""A run's log.md, metrics.jsonl, samples.md, pictures, report.html and console output."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gptforge import files
from gptforge.checkpoint.async_saver import SavedCheckpoint
from gptforge.checkpoint.out_dir import CURVES, LOG, METRICS, SAMPLES, TRACKING
from gptforge.config import Config
from gptforge.errors import explain_os_error
from gptforge.files import json_line
from gptforge.printable import code_span, escape_markdown, printable, printable_text
from gptforge.report.buffered_log import BufferedLog
from gptforge.report.console import Console
from gptforge.report.curves import save_curves
from gptforge.report.format import ValLoss
from gptforge.report.html_report import save_report
from gptforge.report.log_handler import EVENT, RESULT
from gptforge.report.metrics import (
    EVENT_FIELDS,
    FINAL_FIELDS,
    Event,
    History,
    read_history,
    step_line,
)
from gptforge.report.trackers import Trackers
from gptforge.report.verdict import verdict
from gptforge.shell import quote, shown

logger = logging.getLogger(__name__)

TRUNCATED_ON_RESUME = (LOG, METRICS, SAMPLES)
PLOT_EVERY_SECONDS = 20.0
FENCE = "```"


class RunReport:
    """Writes what happens in a run to its files, and logs it for the console.

    Args:
        config: of the run; its trackers get copies of the events.
        title: heading of the log and the plot.
        program: the command that started this program, for the verdict.
        split_hint: how to get a validation split, for the verdict.
        is_teacher: only log steps and losses: no summary, pictures, samples or verdict.
        enabled: False on all ranks but 0, which write and log nothing.
    """

    def __init__(
        self,
        config: Config,
        *,
        title: str,
        program: str = "python gpt.py",
        split_hint: str = "use",
        is_teacher: bool = False,
        enabled: bool = True,
    ) -> None:
        # Absolute: a callback may change the working directory.
        self.run_dir, self.is_teacher = Path(config.out_dir).absolute(), is_teacher
        self.program, self._split_hint = program, split_hint
        self._title, self._enabled, self._last_plot = title, enabled, 0.0
        self.console, self._max_steps = Console(), config.max_steps
        self.trackers = Trackers(config.trackers if enabled else [], config)
        self._logs = {
            name: BufferedLog(self.run_dir / name, self._warn) for name in TRUNCATED_ON_RESUME
        }
        self._has_warned = self._plot_failed = False
        self._final: Event = {}
        self.observers: list[Callable[[Event], object]] = []
        """Called with each event after it is written, as metrics.jsonl has it."""

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Log to the console only."""
        if self._enabled:
            logger.log(level, text)

    def log_line(self, line: str, level: int = logging.INFO) -> None:
        """Log a line to log.md and the console."""
        self._write(LOG, line + "\n")
        self.log(line, level)

    def log_event(self, event: str, **fields: object) -> None:
        """Add an event to metrics.jsonl."""
        self._write_event(self._format_event(event, fields))

    def start(self, summary: str, facts: Mapping[str, Any]) -> None:
        """Begin the logs of a new run with the model summary; `facts` are fields of its event.

        Those that an earlier start left without any checkpoint are deleted.
        """
        for log in self._logs.values():
            log.delete()
        files.remove(self.run_dir / TRACKING)
        if not self.is_teacher:
            self.log(f"{summary}\n\nStarting training...\n")
        heading = f"# {escape_markdown(self._title)}\n\nMade by {code_span(facts['command'])}.\n"
        self._write(LOG, f"{heading}\n{FENCE}text\n{summary}\n\nStarting training...\n\n")
        self._write(SAMPLES, f"# Samples: {escape_markdown(self._title)}\n")
        self.log(json_line(facts).strip(), logging.DEBUG)
        self.log_event("start", **facts)

    def resume(
        self,
        checkpoint: SavedCheckpoint,
        sizes: Mapping[str, int],
        *,
        best: tuple[int, float],
        facts: Mapping[str, Any],
    ) -> None:
        """Truncate the files as `truncate` does, and continue them."""
        step, name = checkpoint.step, checkpoint.name
        self.truncate(checkpoint, sizes, best=best)
        self.log_line(f"Resuming from {name}: step {step} of {self._max_steps}")
        self.log_event("resume", step=step, checkpoint=name, **facts)

    def truncate(
        self, checkpoint: SavedCheckpoint, sizes: Mapping[str, int], *, best: tuple[int, float]
    ) -> None:
        """Truncate the files to their `sizes` at a checkpoint.

        The evaluation of the best one, with this step and loss, is kept if it is a later one.
        """
        kept: list[Event] = []
        if self._enabled:
            if best[0] > checkpoint.step:
                history = self._history()
                known = [*history.evals, *([history.dropped_best] if history.dropped_best else [])]
                kept = [e for e in known if (e["step"], e["val_loss"]) == best][-1:]
            for name, log in self._logs.items():
                log.truncate(sizes.get(name, 0))
        for event in kept:
            self.log_event("dropped_best", **{n: event[n] for n in EVENT_FIELDS["eval"]})
        # The sizes were taken before the save finished, so its event was cut off.
        self.log_saves([checkpoint])

    def log_anomaly(self, event: Event, *, z_score: float) -> None:
        """Log a loss spike or a skipped step; "windows" are the sequences that it trained on."""
        loss, windows = event["loss"], event["windows"]
        what = f"loss {loss}, gradient norm {event['norm']}: the step was skipped"
        if event["kind"] == "spike":
            what = f"a loss of {loss:.4f}, {z_score:.0f} robust deviations above the recent ones"
        listed = ", ".join(map(str, windows[:4])) + (", ..." if len(windows) > 4 else "")
        place = f"step {event['step']}, epoch {event['epoch']:.2f}, sequences {listed}"
        self.log_line(f"anomaly at {place}: {what}", logging.WARNING)
        self.log_event("anomaly", **event)

    def log_step(self, event: Event) -> None:
        """Log one step, of which `event` has the fields of a train event."""
        self.log_line(step_line(event))
        self.log_event("train", **event)
        metrics = {name: value for name, value in event.items() if name != "step"}
        self.trackers.log("train", event["step"], metrics)

    def log_eval(self, step: int, score: ValLoss, *, epoch: float, is_best: bool) -> None:
        """Log the validation loss after `step` steps."""
        loss, bits_per_byte, nats_per_char = score.loss, score.bits_per_byte, score.nats_per_char
        # With a character tokenizer they are the same number.
        is_per_char = f"{nats_per_char:.4f}" == f"{loss:.4f}"
        self.log_line(
            f"after {step} step{'s' * (step != 1)} | held-out loss: {loss:.4f} nats per token | "
            f"bits per byte: {bits_per_byte:.4f}"
            f"{'' if is_per_char else f' | nats per character: {nats_per_char:.4f}'}"
            f"{' | best so far' if is_best else ''}"
        )
        losses = {"val_loss": loss, "val_bpb": bits_per_byte, "val_nats_per_char": nats_per_char}
        self.log_event("eval", step=step, **losses, val_tokens=score.num_tokens, epoch=epoch)
        self.trackers.log("eval", step, losses)

    def log_sample(self, step: int, text: str, *, is_last: bool) -> None:
        """Add a generated text to the samples; the last one is printed too."""
        self.log(f"\nSample:\n\n{text.strip()}", logging.INFO if is_last else logging.DEBUG)
        text = printable_text(text)
        self.trackers.log("sample", step, {"text": text})
        # More tildes than anywhere in the text, which could close the fence otherwise.
        fence = "~~~"
        while fence in text:
            fence += "~"
        self._write(SAMPLES, f"\n## After {step} steps\n\n{fence}text\n{text}\n{fence}\n")

    def log_saves(self, saves: Iterable[SavedCheckpoint]) -> None:
        """Log checkpoints that are on disk now."""
        for save in saves:
            self.log(f"saved {save.name}{', the best' if save.is_best else ''}", logging.DEBUG)
            self.log_event("save", step=save.step, checkpoint=save.name, best=save.is_best)

    def set_final_eval(self, step: int, score: ValLoss) -> None:
        """Set the best checkpoint's loss on all held-out text, for `plot` and `finish`."""
        if math.isfinite(score.loss):
            values = (score.loss, score.bits_per_byte, score.nats_per_char, score.num_tokens)
            self._final = {"best_step": step, **dict(zip(FINAL_FIELDS, values, strict=True))}

    def plot(self, *, force: bool = False) -> None:
        """Draw the curves, unless that was done in the last 20 seconds."""
        now = time.monotonic()
        is_due = force or now - self._last_plot >= PLOT_EVERY_SECONDS
        if not self._enabled or self.is_teacher or not is_due:
            return
        try:
            save_curves(self._history(), self.run_dir / CURVES, title=printable(self._title))
            self._plot_failed = False
        except Exception as error:
            # Whatever matplotlib raises, training continues without the plot.
            if not self._plot_failed:
                self.log(f"note: the curves could not be drawn: {error}", logging.WARNING)
            self._plot_failed = True
        self._last_plot = time.monotonic()

    def finish(
        self, reason: str, *, step: int, epochs: float, seconds: float, has_val: bool
    ) -> None:
        """Close the log with the verdict. The end event is written last: no file is incomplete."""
        if not self._enabled:
            return
        facts = {"reason": reason, "step": step, "epoch": epochs, "seconds": round(seconds, 3)}
        if self.is_teacher:
            self._write(LOG, f"{FENCE}\n")
            self.log_event("end", **facts)
            return
        summary = verdict(
            self._history(),
            max_steps=self._max_steps,
            out_dir=shown(self.run_dir),
            has_val=has_val,
            split_hint=self._split_hint,
            program=self.program,
        )
        picture = f"\n![Training curves]({CURVES})\n"
        curves = f"\nCurves: {shown(self.run_dir / CURVES)}"
        if self._plot_failed:
            picture = curves = ""
        self._write(LOG, f"{FENCE}\n\n{summary}\n{picture}")
        end = self._format_event("end", facts | self._final)
        self.log(f"\n{summary}{curves}{self._save_html(end)}", RESULT)
        self._write_event(end)
        if incomplete := [shown(log.path) for log in self._logs.values() if log.pending]:
            warning = f"warning: the end of {', '.join(incomplete)} could not be written"
            self.log(warning, logging.WARNING)
        if reason in ("finished", "early_stop") and not self._plot_failed:
            curves_file = {"training_curves": self.run_dir / CURVES}
            self.trackers.log("end", step, {**self._final, **curves_file})
        self.trackers.finish(reason)

    def _save_html(self, end: str) -> str:
        """Write report.html; returns the line that names it, empty if that failed."""
        try:
            pending = self._logs[METRICS].pending + end
            path = save_report(self.run_dir, pending=pending, program=self.program)
            return f"\nReport: {shown(path)}"
        except Exception as error:
            # A run must not fail because its report cannot be written.
            retry = f"{self.program} report {quote(shown(self.run_dir))}"
            self.log(f"note: no report was written ({error}); retry: {retry}", logging.WARNING)
            return ""

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each log file: where to truncate it when resuming from here."""
        return {name: log.size for name, log in self._logs.items()} if self._enabled else {}

    def _format_event(self, event: str, fields: Mapping[str, object]) -> str:
        return json_line({"event": event, **fields, "time": round(time.time(), 3)})

    def _write_event(self, line: str) -> None:
        if not self.is_teacher:  # the events that --log_format json prints are those of one run
            self.log(line.strip(), EVENT)
        self._write(METRICS, line)
        for observer in self.observers:
            observer(json.loads(line))

    def _write(self, name: str, text: str) -> None:
        if self._enabled:
            self._logs[name].write(text)

    def _history(self) -> History:
        history = read_history(self.run_dir / METRICS, pending=self._logs[METRICS].pending)
        history.final = self._final or None  # the end event is written last
        return history

    def _warn(self, path: Path, error: OSError) -> None:
        if not self._has_warned:
            reason, fix = explain_os_error(error)
            self.log(
                f"warning: {shown(path)} cannot be written ({reason}): training continues as "
                "long as checkpoints can be saved, and missing log lines are added later; "
                f"{fix or 'check the disk'}",
                logging.WARNING,
            )
        self._has_warned = True
