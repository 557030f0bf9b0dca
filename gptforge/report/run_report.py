"""The run folder's log.md, metrics.jsonl, samples.md and training_curves.png, and the console."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptforge.checkpoint.async_saver import SavedCheckpoint
from gptforge.files import json_line
from gptforge.printable import (
    code_span,
    escape_markdown,
    printable,
    printable_text,
)
from gptforge.report.buffered_log import BufferedLog
from gptforge.report.console import Console, PlainConsole
from gptforge.report.curves import save_curves
from gptforge.report.metrics import History, read_history, step_line
from gptforge.report.verdict import verdict

LOG = "log.md"
METRICS = "metrics.jsonl"
SAMPLES = "samples.md"
CURVES = "training_curves.png"
TRUNCATED_ON_RESUME = (LOG, METRICS, SAMPLES)
REDRAW_SECONDS = 20.0
FENCE = "```"


class RunReport:
    """Tells people and files what happens, in the order it happens."""

    def __init__(
        self,
        run_dir: Path,
        *,
        title: str,
        program: str = "python gpt.py",
        split_hint: str = "use",
    ) -> None:
        self.run_dir = run_dir
        self._program, self._how_to_part = program, split_hint
        self.console: Console = PlainConsole()
        self._title = title
        self._drawn = 0.0
        self._logs = {
            name: BufferedLog(run_dir / name, self._refused) for name in TRUNCATED_ON_RESUME
        }
        self._is_log_refused = self._is_picture_refused = False

    def delete_logs(self) -> None:
        """Delete the logs of a start that came to nothing."""
        for log in self._logs.values():
            log.delete()

    def start(self, summary: str, *, command: str, facts: Mapping[str, Any]) -> None:
        """Open the log with the model summary."""
        self.console.log(f"{summary}\n\nStarting training...\n")
        heading = f"# {escape_markdown(self._title)}\n\nMade by {code_span(command)}.\n"
        self._write(LOG, f"{heading}\n{FENCE}text\n{summary}\n\nStarting training...\n\n")
        self._write(SAMPLES, f"# Samples: {escape_markdown(self._title)}\n")
        self._event("start", command=command, **facts)

    def resume(
        self,
        step: int,
        sizes: Mapping[str, int],
        *,
        checkpoint: str,
        is_best: bool,
        command: str,
    ) -> None:
        """Cut the files back to a checkpoint and go on behind it."""
        self._truncate(sizes)
        # The files were measured before the checkpoint was whole: its own event was cut off.
        self.log_saves([SavedCheckpoint(step, checkpoint, is_best)])
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
        """Training went back to a checkpoint, and so do the files.

        Args:
            step: updates made at that checkpoint.
            sizes: of the files when it was made.
            checkpoint: its name.
            is_best: whether it is the best one.
            bad_steps: the steps that were no good.
            left_out: places in the stream of windows between which nothing is learned.
        """
        self._truncate(sizes)
        self.log_saves([SavedCheckpoint(step, checkpoint, is_best)])
        line = (
            f"no finite loss in steps {bad_steps[0]} to {bad_steps[-1]}: back to {checkpoint}; "
            f"windows {skipped[0]} to {skipped[1] - 1} of the stream are left out"
        )
        self.console.log(line)
        self._write(LOG, line + "\n")
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
        """Something is wrong with one step: its loss, and the batch's place in the text."""
        what = (
            f"a loss of {loss:.4f}, {score:.0f} robust deviations above the recent ones"
            if kind == "spike"
            else f"loss {loss}, gradient norm {norm}: the update was left out"
        )
        places = ", ".join(map(str, sequences[:4])) + (", ..." if len(sequences) > 4 else "")
        line = f"anomaly at step {step}, epoch {epoch:.2f}, windows {places}: {what}"
        self.console.log(line)
        self._write(LOG, line + "\n")
        facts = {"loss": loss, "norm": norm, "epoch": epoch, "windows": sequences}
        self._event("anomaly", kind=kind, step=step, **facts)

    def _truncate(self, sizes: Mapping[str, int]) -> None:
        for name, log in self._logs.items():
            log.truncate(sizes.get(name, 0))

    def log_step(self, event: dict[str, Any]) -> None:
        """Log one update, in the seed's format."""
        self.console.log(step_line(event))
        self._write(LOG, step_line(event) + "\n")
        self._event("train", **event)

    def log_eval(
        self, step: int, *, loss: float, bits_per_byte: float, epoch: float, is_best: bool
    ) -> None:
        """Log a judgement on the held-out text after `step` updates."""
        line = (
            f"after {step} step{'s' * (step != 1)} | held-out loss: {loss:.4f} | "
            f"bits per byte: {bits_per_byte:.4f}"
            f"{' | best so far' if is_best else ''}"
        )
        self.console.log(line)
        self._write(LOG, line + "\n")
        self._event("eval", step=step, val_loss=loss, val_bpb=bits_per_byte, epoch=epoch)

    def log_sample(self, step: int, text: str, *, is_last: bool) -> None:
        """Keep a piece of text that the model wrote; show the last one."""
        if is_last:
            self.console.log(f"\nWhat it writes now:\n\n{text.strip()}")
        text = printable_text(text)
        # Tildes, longer than any in the text, so that the text cannot close its own fence.
        fence = "~~~"
        while fence in text:
            fence += "~"
        self._write(SAMPLES, f"\n## After {step} steps\n\n{fence}text\n{text}\n{fence}\n")

    def log_saves(self, saves: Iterable[SavedCheckpoint]) -> None:
        """Checkpoints are on the disk."""
        for saved in saves:
            self._event("save", step=saved.step, checkpoint=saved.name, best=saved.is_best)

    def plot(self, *, force: bool = False) -> None:
        """Draw the curves, unless that was just done."""
        if not force and time.monotonic() - self._drawn < REDRAW_SECONDS:
            return
        try:
            save_curves(self._history(), self.run_dir / CURVES, title=printable(self._title))
            self._is_picture_refused = False
        except Exception as error:
            # A picture is no reason to lose a training, whatever the drawing library raises.
            if not self._is_picture_refused:
                self.console.log(f"note: the curves could not be drawn: {error}")
            self._is_picture_refused = True
        self._drawn = time.monotonic()

    def finish(
        self, reason: str, *, step: int, epochs: float, seconds: float, has_val: bool
    ) -> None:
        """Close the log with the verdict. The event comes last: behind it nothing is missing."""
        words = verdict(
            self._history(),
            total_steps=step,
            epochs=epochs,
            out_dir=self.run_dir.as_posix(),
            has_val=has_val,
            split_hint=self._how_to_part,
            program=self._program,
        )
        self._write(LOG, f"{FENCE}\n\n{words}\n")
        pictures = f"\nCurves: {(self.run_dir / CURVES).as_posix()}"
        self.console.log(f"\n{words}{'' if self._is_picture_refused else pictures}")
        self._event("end", reason=reason, step=step, epoch=epochs, seconds=round(seconds, 3))
        if lacking := [log.path.as_posix() for log in self._logs.values() if log.pending]:
            self.console.log(f"warning: the end of {', '.join(lacking)} could not be written")

    def file_sizes(self) -> dict[str, int]:
        """How long each file is now: where to cut it when going on from here."""
        return {name: log.size for name, log in self._logs.items()}

    def _event(self, event: str, **fields: object) -> None:
        record = {"event": event, **fields, "time": round(time.time(), 3)}
        self._write(METRICS, json_line(record))

    def _write(self, name: str, text: str) -> None:
        self._logs[name].write(text)

    def _history(self) -> History:
        return read_history(self.run_dir / METRICS, pending=self._logs[METRICS].pending)

    def _refused(self, path: Path, error: OSError) -> None:
        if not self._is_log_refused:
            self.console.log(
                f"warning: {path.as_posix()} cannot be written ({error.strerror or error}): "
                "training goes on as long as checkpoints can be saved, and what the logs lack is "
                "added as soon as there is room"
            )
        self._is_log_refused = True


class NullReport(RunReport):
    """As `RunReport`, without files."""

    def delete_logs(self) -> None:
        """Rank 0 does it."""

    def plot(self, *, force: bool = False) -> None:
        """Rank 0 draws."""

    def finish(self, reason: str, **facts: Any) -> None:
        """Rank 0 closes the log."""

    def file_sizes(self) -> dict[str, int]:
        """Of no files."""
        return {}

    def _truncate(self, sizes: Mapping[str, int]) -> None:
        pass

    def _write(self, name: str, text: str) -> None:
        pass
