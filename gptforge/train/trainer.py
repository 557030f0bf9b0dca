"""The training loop. It receives finished parts and never builds them."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptforge.checkpoint.saver import BackgroundSaver
from gptforge.checkpoint.store import Snapshot, read_state, step_of
from gptforge.checkpoint.tensors import generator_tensors, model_tensors, optimizer_tensors
from gptforge.config import SEED_LIMIT, Config
from gptforge.data.loader import Loader
from gptforge.distributed import Agreement, Ranks
from gptforge.errors import RunError
from gptforge.evaluate.heldout import HeldOut, HeldOutLoss, PartialLoss
from gptforge.generate.language_model import LanguageModel
from gptforge.hardware import synchronize
from gptforge.holding import Hold
from gptforge.optim.schedule import warmup_cosine
from gptforge.report.run_report import RunReport
from gptforge.tokenizers import Tokenizer
from gptforge.train.anomalies import Anomaly, Watch
from gptforge.train.guards import WISHES, Reason, StopGuard
from gptforge.train.progress import MAX_RECENT, Duty, Progress, restore
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
    inputs: Sequence[str]
    """Fingerprints of the files that the training text comes from."""
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
    _recent_losses: deque[Tensor] = field(init=False)
    _rolled_back_to: int = field(init=False, default=-1)
    _save_deferred: bool = field(init=False, default=False)

    def run(self) -> Reason:
        """Train to the last step, or until asked to stop; either way the state is saved."""
        device = self.train_step.device
        self._begun = time.perf_counter() - self.progress.seconds
        self._clock = Stopwatch(lambda: synchronize(device))
        self._start_counting()
        # Nothing may be left to do but the end, where a crash came between the last save and that.
        reason: Reason | None = "finished"
        if self.steps_left or self.progress.pending:
            reason = None
        with self.guard, self.report.console:
            while reason is None:
                # What a stop left undone at this step comes before the next step.
                if not self.progress.pending and self.has_broken_down(self.learn()):
                    self.go_back()
                    continue
                is_best = self.finish_step()
                is_done = not self.steps_left and self.progress.pending in ([], ["save"])
                reason = "finished" if is_done else self.wish()
                if reason in ("interrupted", "terminated") and not self.guard.has_to_end():
                    self.report.console.say("Stopping: another rank was told to.")
                if reason or is_best or self.may_save():
                    self.save(is_best=is_best)
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

    def due(self) -> list[Duty]:
        """What is to be done after the current step, in this order."""
        c = self.config
        cadences: dict[Duty, int] = {
            "evaluate": c.eval_every,
            "sample": c.sample_every,
            "save": c.save_every,
        }
        due = [duty for duty, every in cadences.items() if self.is_due(every)]
        return [*due, "save"] if self._save_deferred and "save" not in due else due

    def may_save(self) -> bool:
        """Whether a save is due and the last step was a good one; else the next good one saves."""
        if self.progress.pending != ["save"]:
            return False
        self._save_deferred = self.watch.in_a_row > 0
        if self._save_deferred:
            self.progress.pending.clear()
        return not self._save_deferred

    def is_due(self, every: int) -> bool:
        """Whether something done each `every` updates, and at the end, is due; 0: at the end."""
        return not self.steps_left or (every > 0 and self.progress.step % every == 0)

    def finish_step(self) -> bool:
        """Evaluate and sample where that is pending; whether the model is the best so far.

        What a stop cuts short stays pending, and is saved so.
        """
        pending, is_best = self.progress.pending, False
        if "evaluate" in pending:
            found = self.judge()
            if found is None:
                return False
            is_best = found
            pending.remove("evaluate")
        if "sample" in pending:
            self.sample()
            pending.remove("sample")
        return is_best

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
        self._loss = loss
        if self.held_out is None:
            # A copy: a recorded step writes its next loss to the same place.
            self._recent_losses.append(loss.clone())
        self.progress.step += 1
        self.progress.pending = self.due()
        if self.steps_left:
            self.loader.send_next()
        # Reading a number off the device waits for it, so that is left for the steps that log.
        if step % c.log_every == 0 or not self.steps_left:
            self._log(step, loss, norm, lr)
        self.report.console.advance(self.progress.step, f"loss {self.progress.loss:.3f}")
        found = self.watch.add(step, position, loss, norm)
        # Whether this step was a good one has to be known before it is evaluated or saved.
        return found + self.watch.settle() if self.progress.pending else found

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
            self.report.saved(self.saver.collect())
            before, behind = self.progress, self.loader.position
            reached, rollbacks = before.step, before.rollbacks + 1
            path, warnings = self._newest()
            for warning in warnings:
                self.report.console.say(f"note: {warning}")
            if path is None or rollbacks > MOST_RETURNS:
                why = f"{rollbacks - 1} returns did not help" if path else "nothing was saved yet"
                raise RunError(
                    f"no finite loss for {PATIENCE} steps in a row, and {why}: training broke down "
                    f"at step {reached - 1}: {REMEDY}"
                )
            self.progress = restore(path, self.train_step, self.loader, self.ranks)
            self.progress.rollbacks = rollbacks
            self.progress.diverged_at = max(before.diverged_at, reached)
            self._rolled_back_to = self.progress.step
            self._save_deferred = False
            self.ranks.on_first(lambda: self.saver.store.abandon(self.progress.step))
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
            self._start_counting()
            self._keep_best(before)
        self._clock.lap()

    def _keep_best(self, before: Progress) -> None:
        """After a rollback behind the best checkpoint, that one stays the best."""
        p = self.progress
        if before.best_loss < p.best_loss:
            p.best_loss, p.best_step = before.best_loss, before.best_step
            self.report.console.say(
                f"note: step {p.best_step} stays the best so far, with a loss of {p.best_loss:.4f}"
            )

    def judge(self) -> bool | None:
        """Score the model, by held-out text where there is some; whether it is the best so far.

        None if somebody would rather stop than wait for the score.
        """
        p, step = self.progress, self.train_step
        with self._aside():
            score: HeldOutLoss | None = None
            if self.held_out is None:
                loss = self._recent_loss()
            else:
                found = self.held_out.evaluate_until(
                    self.guard.has_to_end, step.judged, step.precision, self.ranks, p.partial
                )
                if isinstance(found, PartialLoss):
                    p.partial = found
                    return None
                p.partial, score, loss = None, found, found.loss
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
        return is_best

    def _recent_loss(self) -> float:
        """The mean training loss of the last steps, as many at each evaluation.

        NaN while steps go wrong: the mean of those before them says nothing of the weights now.
        """
        losses = [loss for loss in map(float, self._recent_losses) if math.isfinite(loss)]
        return sum(losses) / len(losses) if losses and not self.watch.in_a_row else math.nan

    def sample(self) -> None:
        """Have the model write a little, with dice of its own, so that training does not notice."""
        with self._aside():
            model = self.train_step.whole_model()
            if model is None:
                return
            writer = LanguageModel(model, self.tokenizer)
            seed = (self.config.seed + self.progress.step) % SEED_LIMIT
            text = writer.generate("", SAMPLE_TOKENS, seed=seed)
            self.report.sampled(self.progress.step, text, is_last=not self.steps_left)

    def save(self, *, is_best: bool) -> None:
        """Begin to write a checkpoint, beside the training."""
        with self._aside():
            p = self.progress
            self._save_deferred = False
            # What is still to be evaluated is saved once more when that is done.
            if p.pending == ["save"]:
                p.pending.clear()
            self.has_broken_down(self.watch.settle())
            # The best model is a sound one, whatever the steps before it were.
            p.bad_steps = 0 if is_best else self.watch.in_a_row
            if p.step > p.diverged_at and not p.bad_steps:
                p.rollbacks = 0
            self.saver.submit(p.step, self.snapshot(), is_best=is_best)

    def snapshot(self) -> Snapshot:
        """Everything the run needs to go on from here."""
        p, step = self.progress, self.train_step
        p.loss = float(self._loss)
        p.recent_losses = [float(loss) for loss in self._recent_losses]
        p.seconds = time.perf_counter() - self._begun
        state = {
            "version": 1,
            **p.to_json(),
            "loader": self.loader.state_dict(),
            "scaler": step.scaler_state(),
            "text_sha256": self.text_sha256,
            "inputs": list(self.inputs),
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
        """The newest checkpoint of sound weights, and what to say about damaged ones.

        An older one, if there is one, where training diverged from the newest before.
        """
        store = self.saver.store

        def is_sound(path: Path) -> bool:
            return not read_state(path)["progress"].get("bad_steps")

        def look() -> tuple[str | None, list[str]]:
            path, warnings = store.newest(is_sound)
            if path is not None and step_of(path) == self._rolled_back_to:
                newest = path
                older, more = store.newest(lambda path: path != newest and is_sound(path))
                path, warnings = older or newest, warnings + more
            return None if path is None else path.as_posix(), warnings

        path, warnings = self.ranks.on_first(look)
        return path and Path(path), warnings

    def _start_counting(self) -> None:
        """Set the running sums to what `progress` says."""
        p, device = self.progress, self.train_step.device
        size = max(1, min(self.config.eval_every or MAX_RECENT, MAX_RECENT))
        self._recent_losses = deque(
            (torch.tensor(loss, device=device) for loss in p.recent_losses), maxlen=size
        )
        self.watch.reset(p.bad_steps)
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
