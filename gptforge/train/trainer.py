"""The training loop. It receives finished parts and never builds them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptforge.checkpoint.saver import BackgroundSaver
from gptforge.checkpoint.store import Snapshot, read_state
from gptforge.checkpoint.tensors import generator_tensors, model_tensors, optimizer_tensors
from gptforge.config import Config
from gptforge.data.loader import Loader
from gptforge.distributed import Agreement, Ranks
from gptforge.errors import RunError
from gptforge.evaluate.heldout import HeldOut
from gptforge.generate.language_model import LanguageModel
from gptforge.hardware import synchronize
from gptforge.holding import Hold
from gptforge.optim.schedule import warmup_cosine
from gptforge.report.run_report import RunReport
from gptforge.tokenizers import Tokenizer
from gptforge.train.anomalies import Anomaly, Watch
from gptforge.train.guards import WISHES, Reason, StopGuard
from gptforge.train.progress import Progress, restore
from gptforge.train.step import TrainStep

SAMPLE_TOKENS = 200
PATIENCE = 5
"""Steps in a row without a finite loss and gradient before training goes back."""
MOST_RETURNS = 3
"""Times it goes back before it gives up."""
REMEDY = "a lower --max_lr, a longer --warmup_steps or a look at the text may help"


class Stopwatch:
    """Wall time of updates alone: what happens inside `paused` does not count."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        self._wait()
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block out of the time."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self._start += time.perf_counter() - begin


@dataclass
class Trainer:
    """A run, ready to go on from `progress`."""

    config: Config
    train_step: TrainStep
    loader: Loader
    held_out: HeldOut | None
    tokenizer: Tokenizer
    saver: BackgroundSaver
    report: RunReport
    guard: StopGuard
    watch: Watch
    text_sha256: str
    """Of the training text: a run goes on with the same one only."""
    progress: Progress
    lock: Hold
    """Not closed as long as no other process may train into the same folder."""
    ranks: Ranks
    """Who trains together; report, saver and lock of all but the first do nothing."""
    wishes: Agreement
    """Makes one rank's wish to stop everybody's."""

    _clock: Stopwatch = field(init=False)
    _begun: float = field(init=False)
    _logged: int = field(init=False)
    _loss: Tensor = field(init=False)
    _loss_sum: Tensor = field(init=False)
    _loss_count: Tensor = field(init=False)

    def run(self) -> Reason:
        """Train to the last step, or until asked to stop; either way the state is saved."""
        device = self.train_step.device
        self._begun = time.perf_counter() - self.progress.seconds
        self._clock = Stopwatch(lambda: synchronize(device))
        self._start_counting()
        # Nothing may be left to do but the end, where a crash came between the last save and that.
        reason: Reason | None = "finished"
        if self.steps_left or self.progress.unjudged:
            reason = None
        with self.guard, self.report.console:
            while reason is None:
                if self.steps_left and self.has_broken_down(self.learn()):
                    self.go_back()
                    continue
                is_best = self.is_due(self.config.eval_every) and self.judge()
                self.progress.unjudged = int(is_best is None and not self.steps_left)
                if is_best is not None and self.is_due(self.config.sample_every):
                    self.sample()
                is_done = not self.steps_left and not self.progress.unjudged
                reason = "finished" if is_done else self.wish()
                if reason in ("interrupted", "terminated") and not self.guard.has_to_end():
                    self.report.console.say("Stopping: another rank was told to.")
                is_owed = self.is_due(self.config.save_every) and not self.progress.unjudged
                if reason or is_best or is_owed:
                    self.save(is_best=bool(is_best))
                self.report.saved(self.saver.collect())
            self.saver.wait()
        self.report.saved(self.saver.collect())
        self.report.redraw(force=True)
        self.report.end(
            reason,
            step=self.progress.step,
            epochs=self.loader.epoch,
            seconds=self.progress.seconds,
            is_judged=self.held_out is not None,
        )
        self.lock.close()
        p = self.progress
        if reason == "finished" and not (math.isfinite(p.loss) or math.isfinite(p.best_loss)):
            raise RunError(
                f"training broke down before step {p.step}, and nothing was learned: {REMEDY}; "
                "--overwrite starts anew"
            )
        return reason

    @property
    def steps_left(self) -> int:
        """Updates still to make."""
        return self.config.max_steps - self.progress.step

    def is_due(self, every: int) -> bool:
        """Whether something done each `every` updates, and at the end, is due; 0: at the end."""
        return not self.steps_left or (every > 0 and self.progress.step % every == 0)

    def learn(self) -> list[Anomaly]:
        """Make one update; log it if its line is due. Returns what is found to have gone wrong."""
        c, step, position = self.config, self.progress.step, self.loader.position
        lr = warmup_cosine(
            step,
            max_lr=c.max_lr,
            min_lr=c.min_lr,
            warmup_steps=c.warmup_steps,
            max_steps=c.max_steps,
        )
        inputs, targets = self.loader.next()
        loss, norm = self.train_step(inputs, targets, lr=lr)
        counts = loss.isfinite()
        self._loss = loss
        self._loss_sum += torch.where(counts, loss, 0)
        self._loss_count += counts
        self.progress.step += 1
        if self.steps_left:
            self.loader.send_next()
        # Reading a number off the device waits for it, so that is left for the steps that log.
        if step % c.log_every == 0 or not self.steps_left:
            self._log(step, loss, norm, lr)
        self.report.console.advance(self.progress.step, f"loss {self.progress.loss:.3f}")
        found = self.watch.add(step, position, loss, norm)
        return found if self.steps_left else found + self.watch.settle()

    def has_broken_down(self, anomalies: list[Anomaly]) -> bool:
        """Report what went wrong; whether it went wrong too often in a row to go on from here."""
        for found in anomalies:
            self.report.anomaly(
                found.kind,
                found.step,
                loss=found.loss,
                norm=found.norm,
                score=found.score,
                epoch=found.position / self.loader.windows,
                windows=self.loader.windows_at(found.position),
            )
        return any(found.in_a_row >= PATIENCE for found in anomalies)

    def wish(self) -> Reason | None:
        """Why to stop now, as all ranks agree, or None."""
        agreed = self.wishes.say(WISHES.index(self.guard.wish()))
        return WISHES[agreed]

    def go_back(self) -> None:
        """Return to the newest whole checkpoint, and do without the data since then."""
        with self._aside():
            self.saver.wait()
            reached, behind = self.progress.step, self.loader.position
            returns = self.progress.returns + 1
            path, warnings = self._newest()
            for warning in warnings:
                self.report.console.say(f"note: {warning}")
            if path is None or returns > MOST_RETURNS:
                why = f"{returns - 1} returns did not help" if path else "nothing was saved yet"
                raise RunError(
                    f"no finite loss for {PATIENCE} steps in a row, and {why}: training broke down "
                    f"at step {reached - 1}: {REMEDY}"
                )
            self.progress = restore(path, self.train_step, self.loader, self.ranks)
            self.progress.returns = returns
            bad_steps = list(range(reached - PATIENCE, reached))
            self.report.returned(
                self.progress.step,
                self.ranks.on_first(lambda: read_state(path)["file_sizes"]),
                checkpoint=path.name,
                is_best=self.progress.best_step == self.progress.step,
                bad_steps=bad_steps,
                left_out=(self.loader.position, behind),
            )
            self.loader.load_state_dict({"position": behind})
            self.watch.forget()
            self._start_counting()
        self._clock.lap()

    def judge(self) -> bool | None:
        """Score the model, by held-out text where there is some; whether it is the best so far.

        None if somebody would rather stop than wait for the score.
        """
        p, step = self.progress, self.train_step
        with self._aside():
            score = None
            if self.held_out is None:
                seen = float(self._loss_count)
                loss = float(self._loss_sum) / seen if seen else math.nan
            else:
                score = self.held_out.evaluate_unless(
                    self.guard.has_to_end, step.judged, step.precision, self.ranks
                )
                if score is None:
                    return None
                loss = score.loss
            is_best = loss < p.best_loss
            if is_best:
                p.best_loss, p.best_step = loss, p.step
            if score is not None:
                self.report.evaluated(
                    p.step,
                    loss=loss,
                    bits_per_byte=score.bits_per_byte,
                    epoch=self.loader.epoch,
                    is_best=is_best,
                )
            self.report.redraw()
        self._loss_sum.zero_()
        self._loss_count.zero_()
        return is_best

    def sample(self) -> None:
        """Have the model write a little, with dice of its own, so that training does not notice."""
        with self._aside():
            model = self.train_step.whole_model()
            if model is None:
                return
            writer = LanguageModel(model, self.tokenizer)
            text = writer.generate("", SAMPLE_TOKENS, seed=self.config.seed + self.progress.step)
            self.report.sampled(self.progress.step, text, is_last=not self.steps_left)

    def save(self, *, is_best: bool) -> None:
        """Begin to write a checkpoint, beside the training."""
        with self._aside():
            self.saver.submit(self.progress.step, self.snapshot(), is_best=is_best)

    def snapshot(self) -> Snapshot:
        """Everything the run needs to go on from here."""
        p, step = self.progress, self.train_step
        p.loss = float(self._loss)
        p.loss_sum, p.loss_count = float(self._loss_sum), float(self._loss_count)
        p.seconds = time.perf_counter() - self._begun
        state = {
            "version": 1,
            "progress": p.to_json(),
            "loader": self.loader.state_dict(),
            "scaler": step.scaler_state(),
            "text_sha256": self.text_sha256,
            "file_sizes": self.report.sizes(),
        }
        return Snapshot(
            model=model_tensors(step.model, self.ranks),
            optimizer=optimizer_tensors(step.model, step.optimizer, self.ranks),
            generators=generator_tensors(step.device, self.ranks),
            state=state,
        )

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is no training: its time does not count, and other ranks may have to wait for it."""
        with self._clock.paused(), self.ranks.busy():
            yield

    def _newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and what to say about damaged ones."""

        def look() -> tuple[str | None, list[str]]:
            path, warnings = self.saver.store.newest()
            return None if path is None else path.as_posix(), warnings

        path, warnings = self.ranks.on_first(look)
        return path and Path(path), warnings

    def _start_counting(self) -> None:
        """Set the running sums to what `progress` says."""
        p, device = self.progress, self.train_step.device
        self._loss_sum = torch.tensor(p.loss_sum, device=device)
        self._loss_count = torch.tensor(p.loss_count, device=device)
        self._loss = torch.tensor(p.loss, device=device)
        self._logged = p.step

    def _log(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        p = self.progress
        p.loss = float(loss)
        # A clock may stand still, or be set back.
        seconds = max(self._clock.lap() / (p.step - self._logged), 1e-9)
        self._logged = p.step
        self.report.step(
            {
                "step": step,
                "loss": p.loss,
                "dt_ms": 1000 * seconds,
                "tok_per_sec": self.config.tokens_per_step / seconds,
                "norm": float(norm),
                "lr": lr,
                "epoch": self.loader.epoch,
            }
        )
