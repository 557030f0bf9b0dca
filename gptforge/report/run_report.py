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
from gptforge.checkpoint.run_files import TRACKING
from gptforge.config import Config
from gptforge.files import json_line
from gptforge.printable import code_span, escape_markdown, printable, printable_text
from gptforge.report.buffered_log import BufferedLog
from gptforge.report.console import Console
from gptforge.report.curves import save_curves
from gptforge.report.format import format_duration
from gptforge.report.html_report import save_report
from gptforge.report.log_handler import EVENT, RESULT
from gptforge.report.metrics import FINAL_FIELDS, METRICS, Event, History, read_history, step_line
from gptforge.report.trackers import Trackers
from gptforge.report.verdict import verdict
from gptforge.shell import quote

logger = logging.getLogger(__name__)

LOG, SAMPLES = "log.md", "samples.md"
CURVES = "training_curves.png"
TRUNCATED_ON_RESUME = (LOG, METRICS, SAMPLES)
PLOT_EVERY_SECONDS = 20.0
FENCE = "```"
STOPPED_BY = {
    "interrupted": "Ctrl-C",
    "terminated": "SIGTERM or SIGHUP",
    "time_limit": "the time limit",
}


class RunReport:
    """Writes what happens in a run to its files, and logs it for the console.

    Args:
        run_dir: the run folder.
        title: heading of the log and the plot.
        program: the command that started this program, for the verdict.
        split_hint: how to get a validation split, for the verdict.
        trackers: get copies of the events, too.
        is_teacher: only log steps and losses: no summary, pictures, samples or verdict.
        enabled: False on all ranks but 0, which write and log nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        title: str,
        program: str = "python gpt.py",
        split_hint: str = "use",
        trackers: Trackers | None = None,
        is_teacher: bool = False,
        enabled: bool = True,
    ) -> None:
        self.run_dir, self.is_teacher = run_dir, is_teacher
        self._program, self._split_hint = program, split_hint
        self._title, self._enabled, self._last_plot = title, enabled, 0.0
        self.console = Console()
        self.trackers = trackers or Trackers([], Config())
        self._logs = {name: BufferedLog(run_dir / name, self._warn) for name in TRUNCATED_ON_RESUME}
        self._has_warned = self._plot_failed = False
        self._final: Event = {}
        self.observers: list[Callable[[Event], object]] = []
        """Called with each event after it is written, as metrics.jsonl has it."""

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Log to the console only."""
        if self._enabled:
            logger.log(level, text)

    def delete_logs(self) -> None:
        """Delete the logs that an earlier start left without any checkpoint."""
        for log in self._logs.values():
            log.delete()
        files.remove(self.run_dir / TRACKING)

    def start(self, summary: str, *, command: str, facts: Mapping[str, Any]) -> None:
        """Begin the logs of a new run with the model summary."""
        if not self.is_teacher:
            self.log(f"{summary}\n\nStarting training...\n")
        heading = f"# {escape_markdown(self._title)}\n\nMade by {code_span(command)}.\n"
        self._write(LOG, f"{heading}\n{FENCE}text\n{summary}\n\nStarting training...\n\n")
        self._write(SAMPLES, f"# Samples: {escape_markdown(self._title)}\n")
        self.log(json_line(facts).strip(), logging.DEBUG)
        self._event("start", command=command, **facts)

    def resume(
        self,
        step: int,
        sizes: Mapping[str, int],
        *,
        max_steps: int,
        checkpoint: str,
        is_best: bool,
        command: str,
    ) -> None:
        """Truncate the files to their sizes at a checkpoint and continue them."""
        self._truncate(step, sizes, checkpoint, is_best)
        self._log_line(f"Resuming from {checkpoint}: step {step} of {max_steps}")
        self._event("resume", step=step, checkpoint=checkpoint, command=command)

    def log_rollback(
        self,
        step: int,
        sizes: Mapping[str, int],
        *,
        checkpoint: str,
        is_best: bool,
        bad_steps: list[int],
        skipped: tuple[int, int],
    ) -> None:
        """Training went back to a checkpoint: truncate the files to it and log why.

        Args:
            step: of the checkpoint; `is_best` says whether it has the best validation loss.
            sizes: `file_sizes` at that checkpoint.
            checkpoint: its name.
            bad_steps: steps without a finite loss.
            skipped: range of training sequences to skip, in training order.
        """
        self._truncate(step, sizes, checkpoint, is_best)
        self._log_line(
            f"no finite loss in steps {bad_steps[0]} to {bad_steps[-1]}: back to {checkpoint}; "
            f"training sequences {skipped[0]} to {skipped[1] - 1} are skipped",
            logging.WARNING,
        )
        facts = {"checkpoint": checkpoint, "bad_steps": bad_steps, "left_out": skipped}
        self._event("anomaly", kind="return", step=step, **facts)

    def log_anomaly(
        self,
        kind: str,
        step: int,
        *,
        loss: float,
        norm: float,
        score: float,
        epoch: float,
        sequences: list[int],
    ) -> None:
        """Log a loss spike or a skipped step, and which sequences of the dataset it trained on."""
        what = f"loss {loss}, gradient norm {norm}: the step was skipped"
        if kind == "spike":
            what = f"a loss of {loss:.4f}, {score:.0f} robust deviations above the recent ones"
        listed = ", ".join(map(str, sequences[:4])) + (", ..." if len(sequences) > 4 else "")
        line = f"anomaly at step {step}, epoch {epoch:.2f}, sequences {listed}: {what}"
        self._log_line(line, logging.WARNING)
        facts = {"loss": loss, "norm": norm, "epoch": epoch, "windows": sequences}
        self._event("anomaly", kind=kind, step=step, **facts)

    def log_step(self, event: Event) -> None:
        """Log one step."""
        self._log_line(step_line(event))
        self._event("train", **event)
        metrics = {name: value for name, value in event.items() if name != "step"}
        self.trackers.log("train", event["step"], metrics)

    def log_eval(
        self,
        step: int,
        *,
        loss: float,
        bits_per_byte: float,
        nats_per_char: float,
        num_tokens: int,
        epoch: float,
        is_best: bool,
    ) -> None:
        """Log the validation loss after `step` steps, on `num_tokens` tokens."""
        # With a character tokenizer they are the same number.
        is_per_char = f"{nats_per_char:.4f}" == f"{loss:.4f}"
        self._log_line(
            f"after {step} step{'s' * (step != 1)} | held-out loss: {loss:.4f} nats per token | "
            f"bits per byte: {bits_per_byte:.4f}"
            f"{'' if is_per_char else f' | nats per character: {nats_per_char:.4f}'}"
            f"{' | best so far' if is_best else ''}"
        )
        losses = {"val_loss": loss, "val_bpb": bits_per_byte, "val_nats_per_char": nats_per_char}
        self._event("eval", step=step, **losses, val_tokens=num_tokens, epoch=epoch)
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
            self.log(f"saved {save.name}{', the best' * save.is_best}", logging.DEBUG)
            self._event("save", step=save.step, checkpoint=save.name, best=save.is_best)

    def log_stop(
        self, reason: str, step: int, *, max_steps: int, best_step: int, seconds_saved: float
    ) -> None:
        """Log why training stops before the last step.

        Call it before the save, or a resumed run, which truncates the log, loses the line.
        """
        line = f"Stopped by {STOPPED_BY.get(reason)} at step {step} of {max_steps}"
        if reason == "early_stop":
            line = (
                f"Stopped early at step {step} of {max_steps}: no better held-out loss since step "
                f"{best_step} (saved about {format_duration(seconds_saved)}); --patience 0 trains "
                "on"
            )
        self._log_line(line, RESULT)

    def set_final_eval(
        self, step: int, *, loss: float, bits_per_byte: float, nats_per_char: float, num_tokens: int
    ) -> None:
        """Set the loss of the best checkpoint, of `step`, on all held-out text.

        `plot` and `finish` report it.
        """
        if math.isfinite(loss):
            values = (loss, bits_per_byte, nats_per_char, num_tokens)
            self._final = {"best_step": step, **dict(zip(FINAL_FIELDS, values, strict=True))}

    def log_no_final_eval(self, checkpoint: str, num_tokens: int, seconds: float) -> None:
        """Log how to evaluate on all held-out text, where the end of training did not."""
        self._log_line(
            f"{checkpoint} was not evaluated on all {num_tokens:,} held-out tokens: "
            f"{self._program} eval {quote(self.run_dir.as_posix())} does that, in about "
            f"{format_duration(seconds)}",
            RESULT,
        )

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
            self._event("end", **facts)
            return
        summary = verdict(
            self._history(),
            total_steps=step,
            epochs=epochs,
            out_dir=self.run_dir.as_posix(),
            has_val=has_val,
            split_hint=self._split_hint,
            program=self._program,
        )
        picture = f"\n![Training curves]({CURVES})\n"
        curves = f"\nCurves: {(self.run_dir / CURVES).as_posix()}"
        if self._plot_failed:
            picture = curves = ""
        self._write(LOG, f"{FENCE}\n\n{summary}\n{picture}")
        end = self._format_event("end", facts | self._final)
        self.log(f"\n{summary}{curves}{self._save_html(end)}", RESULT)
        self._write_event(end)
        if incomplete := [log.path.as_posix() for log in self._logs.values() if log.pending]:
            warning = f"warning: the end of {', '.join(incomplete)} could not be written"
            self.log(warning, logging.WARNING)
        if reason in ("finished", "early_stop") and not self._plot_failed:
            curves_file = {"training_curves": self.run_dir / CURVES}
            self.trackers.log("end", step, {**self._final, **curves_file})
        self.trackers.finish(reason)

    def _save_html(self, end: str) -> str:
        """Write report.html; returns the line that names it, empty if that failed."""
        try:
            path = save_report(self.run_dir, pending=self._logs[METRICS].pending + end)
            return f"\nReport: {path.as_posix()}"
        except Exception as error:
            # A run must not fail at its end for want of a page.
            retry = f"{self._program} report {quote(self.run_dir.as_posix())}"
            self.log(f"note: no report was written ({error}); retry: {retry}", logging.WARNING)
            return ""

    def file_sizes(self) -> dict[str, int]:
        """Bytes of each log file: where to truncate it when resuming from here."""
        return {name: log.size for name, log in self._logs.items()} if self._enabled else {}

    def _truncate(
        self, step: int, sizes: Mapping[str, int], checkpoint: str, is_best: bool
    ) -> None:
        if self._enabled:
            for name, log in self._logs.items():
                log.truncate(sizes.get(name, 0))
        # The sizes were taken before the save finished, so its event was cut off.
        self.log_saves([SavedCheckpoint(step, checkpoint, is_best)])

    def _log_line(self, line: str, level: int = logging.INFO) -> None:
        self._write(LOG, line + "\n")
        self.log(line, level)

    def _event(self, event: str, **fields: object) -> None:
        self._write_event(self._format_event(event, fields))

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
            self.log(
                f"warning: {path.as_posix()} cannot be written ({error.strerror or error}): "
                "training continues as long as checkpoints can be saved, and missing log lines are "
                "added once there is space",
                logging.WARNING,
            )
        self._has_warned = True
