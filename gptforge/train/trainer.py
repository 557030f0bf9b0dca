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

from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.checkpoint.state_dict import model_state_dict, optimizer_state_dict, rng_state_dict
from gptforge.checkpoint.store import Snapshot, read_state, step_from_path
from gptforge.config import SEED_LIMIT, Config
from gptforge.data.dataloader import DataLoader
from gptforge.device import synchronize
from gptforge.distributed import AsyncMax, Comm
from gptforge.errors import RunError
from gptforge.evaluate.val_loss import PartialValLoss, ValEvaluator, ValLoss
from gptforge.inference.language_model import LanguageModel
from gptforge.lock import FolderLock
from gptforge.optim.schedule import warmup_cosine
from gptforge.report.run_report import RunReport
from gptforge.tokenizers import Tokenizer
from gptforge.train.loss_monitor import Anomaly, LossMonitor
from gptforge.train.signals import STOP_REASONS, StopReason, StopSignal
from gptforge.train.state import (
    MAX_RECENT_LOSSES,
    Action,
    TrainState,
    restore,
)
from gptforge.train.train_step import TrainStep

SAMPLE_TOKENS = 200
MAX_BAD_STEPS = 5
"""Steps in a row without a finite loss and gradient before training goes back."""
MAX_ROLLBACKS = 3
"""Times it goes back before it gives up."""
HINT = "a lower --max_lr, a longer --warmup_steps or a look at the text may help"


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
    step_fn: TrainStep
    dataloader: DataLoader
    val_evaluator: ValEvaluator | None
    tokenizer: Tokenizer
    saver: AsyncSaver
    report: RunReport
    stop_signal: StopSignal
    loss_monitor: LossMonitor
    text_sha256: str
    """Of the training text: a run goes on with the same one only."""
    inputs: Sequence[str]
    """Fingerprints of the files that the training text comes from."""
    state: TrainState
    lock: FolderLock | None
    """Not closed as long as no other process may train into the same folder."""
    comm: Comm
    """Who trains together; report, saver and lock of all but the first do nothing."""
    stop_consensus: AsyncMax
    """Makes one rank's wish to stop everybody's."""

    _clock: Stopwatch = field(init=False)
    _begun: float = field(init=False)
    _logged: int = field(init=False)
    _loss: Tensor = field(init=False)
    _recent_losses: deque[Tensor] = field(init=False)
    _rolled_back_to: int = field(init=False, default=-1)
    _save_deferred: bool = field(init=False, default=False)

    def fit(self) -> StopReason:
        """Train to the last step, or until asked to stop; either way the state is saved."""
        device = self.step_fn.device
        self._begun = time.perf_counter() - self.state.seconds
        self._clock = Stopwatch(lambda: synchronize(device))
        self._start_counting()
        # Nothing may be left to do but the end, where a crash came between the last save and that.
        reason: StopReason | None = "finished"
        if self.steps_left or self.state.pending:
            reason = None
        with self.stop_signal, self.report.console:
            while reason is None:
                # What a stop left undone at this step comes before the next step.
                if not self.state.pending and self.has_diverged(self.train_step()):
                    self.rollback()
                    continue
                is_best = self.run_due_actions()
                is_done = not self.steps_left and self.state.pending in ([], ["save"])
                reason = "finished" if is_done else self.stop_reason()
                if reason in ("interrupted", "terminated") and not self.stop_signal.should_stop():
                    self.report.console.log("Stopping: another rank was told to.")
                if reason or is_best or self.should_save():
                    self.save(is_best=is_best)
                self.report.log_saves(self.saver.poll())
            self.saver.wait()
        self.report.log_saves(self.saver.poll())
        self.report.plot(force=True)
        self.report.finish(
            reason,
            step=self.state.step,
            epochs=self.dataloader.epoch,
            seconds=self.state.seconds,
            has_val=self.val_evaluator is not None,
        )
        if self.lock is not None:
            self.lock.release()
        p = self.state
        if reason == "finished" and not (math.isfinite(p.loss) or math.isfinite(p.best_loss)):
            raise RunError(
                f"training broke down before step {p.step}, and nothing was learned: {HINT}; "
                "--overwrite starts anew"
            )
        return reason

    @property
    def steps_left(self) -> int:
        """Updates still to make."""
        return self.config.max_steps - self.state.step

    def due_actions(self) -> list[Action]:
        """What is to be done after the current step, in this order."""
        c = self.config
        cadences: dict[Action, int] = {
            "evaluate": c.eval_every,
            "sample": c.sample_every,
            "save": c.save_every,
        }
        due = [duty for duty, every in cadences.items() if self.is_due(every)]
        return [*due, "save"] if self._save_deferred and "save" not in due else due

    def should_save(self) -> bool:
        """Whether a save is due and the last step was a good one; else the next good one saves."""
        if self.state.pending != ["save"]:
            return False
        self._save_deferred = self.loss_monitor.bad_steps > 0
        if self._save_deferred:
            self.state.pending.clear()
        return not self._save_deferred

    def is_due(self, every: int) -> bool:
        """Whether something done each `every` updates, and at the end, is due; 0: at the end."""
        return not self.steps_left or (every > 0 and self.state.step % every == 0)

    def run_due_actions(self) -> bool:
        """Evaluate and sample where that is pending; whether the model is the best so far.

        What a stop cuts short stays pending, and is saved so.
        """
        pending, is_best = self.state.pending, False
        if "evaluate" in pending:
            found = self.evaluate()
            if found is None:
                return False
            is_best = found
            pending.remove("evaluate")
        if "sample" in pending:
            self.sample()
            pending.remove("sample")
        return is_best

    def train_step(self) -> list[Anomaly]:
        """Make one update; log it if its line is due. Returns what is found to have gone wrong."""
        c, step, position = self.config, self.state.step, self.dataloader.position
        lr = warmup_cosine(
            step,
            max_lr=c.max_lr,
            min_lr=c.min_lr,
            warmup_steps=c.warmup_steps,
            max_steps=c.max_steps,
        )
        inputs, targets = self.dataloader.next_batch()
        loss, norm = self.step_fn(inputs, targets, lr=lr)
        self._loss = loss
        if self.val_evaluator is None:
            # A copy: a recorded step writes its next loss to the same place.
            self._recent_losses.append(loss.clone())
        self.state.step += 1
        self.state.pending = self.due_actions()
        if self.steps_left:
            self.dataloader.prefetch_to_device()
        # Reading a number off the device waits for it, so that is left for the steps that log.
        if step % c.log_every == 0 or not self.steps_left:
            self._log(step, loss, norm, lr)
        self.report.console.update(self.state.step, f"loss {self.state.loss:.3f}")
        found = self.loss_monitor.update(step, position, loss, norm)
        # Whether this step was a good one has to be known before it is evaluated or saved.
        return found + self.loss_monitor.flush() if self.state.pending else found

    def has_diverged(self, anomalies: list[Anomaly]) -> bool:
        """Report what went wrong; whether it went wrong too often in a row to go on from here."""
        for found in anomalies:
            self.report.log_anomaly(
                found.kind,
                found.step,
                loss=found.loss,
                norm=found.norm,
                score=found.z_score,
                epoch=found.position / self.dataloader.num_sequences,
                sequences=self.dataloader.sequence_ids_at(found.position),
            )
        return any(found.bad_steps >= MAX_BAD_STEPS for found in anomalies)

    def stop_reason(self) -> StopReason | None:
        """Why to stop now, as all ranks agree, or None."""
        agreed = self.stop_consensus.update(STOP_REASONS.index(self.stop_signal.stop_reason()))
        return STOP_REASONS[agreed]

    def rollback(self) -> None:
        """Return to the newest whole checkpoint, and do without the data since then."""
        with self._untimed():
            self.saver.wait()
            self.report.log_saves(self.saver.poll())
            before, behind = self.state, self.dataloader.position
            reached, rollbacks = before.step, before.rollbacks + 1
            path, warnings = self._latest_checkpoint()
            for warning in warnings:
                self.report.console.log(f"note: {warning}")
            if path is None or rollbacks > MAX_ROLLBACKS:
                why = f"{rollbacks - 1} returns did not help" if path else "nothing was saved yet"
                raise RunError(
                    f"no finite loss for {MAX_BAD_STEPS} steps in a row, and {why}: training broke down "
                    f"at step {reached - 1}: {HINT}"
                )
            self.state = restore(path, self.step_fn, self.dataloader, self.comm)
            self.state.rollbacks = rollbacks
            self.state.diverged_at = max(before.diverged_at, reached)
            self._rolled_back_to = self.state.step
            self._save_deferred = False
            self.comm.broadcast_from_rank0(lambda: self.saver.store.discard_after(self.state.step))
            bad_steps = list(range(reached - MAX_BAD_STEPS, reached))
            self.report.log_rollback(
                self.state.step,
                self.comm.broadcast_from_rank0(lambda: read_state(path)["file_sizes"]),
                checkpoint=path.name,
                is_best=self.state.best_step == self.state.step,
                bad_steps=bad_steps,
                skipped=(self.dataloader.position, behind),
            )
            self.dataloader.load_state_dict({"position": behind})
            self._start_counting()
            self._keep_best(before)
        self._clock.lap()

    def _keep_best(self, before: TrainState) -> None:
        """After a rollback behind the best checkpoint, that one stays the best."""
        p = self.state
        if before.best_loss < p.best_loss:
            p.best_loss, p.best_step = before.best_loss, before.best_step
            self.report.console.log(
                f"note: step {p.best_step} stays the best so far, with a loss of {p.best_loss:.4f}"
            )

    def evaluate(self) -> bool | None:
        """Score the model, by held-out text where there is some; whether it is the best so far.

        None if somebody would rather stop than wait for the score.
        """
        p, step = self.state, self.step_fn
        with self._untimed():
            score: ValLoss | None = None
            if self.val_evaluator is None:
                loss = self._recent_loss()
            else:
                found = self.val_evaluator.evaluate_until(
                    self.stop_signal.should_stop,
                    step.root_module,
                    step.precision,
                    self.comm,
                    p.partial,
                )
                if isinstance(found, PartialValLoss):
                    p.partial = found
                    return None
                p.partial, score, loss = None, found, found.loss
            is_best = loss < p.best_loss
            if is_best:
                p.best_loss, p.best_step = loss, p.step
            if score is not None:
                self.report.log_eval(
                    p.step,
                    loss=loss,
                    bits_per_byte=score.bits_per_byte,
                    epoch=self.dataloader.epoch,
                    is_best=is_best,
                )
            self.report.plot()
        return is_best

    def _recent_loss(self) -> float:
        """The mean training loss of the last steps, as many at each evaluation.

        NaN while steps go wrong: the mean of those before them says nothing of the weights now.
        """
        losses = [loss for loss in map(float, self._recent_losses) if math.isfinite(loss)]
        return sum(losses) / len(losses) if losses and not self.loss_monitor.bad_steps else math.nan

    def sample(self) -> None:
        """Have the model write a little, with dice of its own, so that training does not notice."""
        with self._untimed():
            model = self.step_fn.unsharded_model()
            if model is None:
                return
            writer = LanguageModel(model, self.tokenizer)
            seed = (self.config.seed + self.state.step) % SEED_LIMIT
            text = writer.generate("", SAMPLE_TOKENS, seed=seed)
            self.report.log_sample(self.state.step, text, is_last=not self.steps_left)

    def save(self, *, is_best: bool) -> None:
        """Begin to write a checkpoint, beside the training."""
        with self._untimed():
            p = self.state
            self._save_deferred = False
            # What is still to be evaluated is saved once more when that is done.
            if p.pending == ["save"]:
                p.pending.clear()
            self.has_diverged(self.loss_monitor.flush())
            # The best model is a sound one, whatever the steps before it were.
            p.bad_steps = 0 if is_best else self.loss_monitor.bad_steps
            if p.step > p.diverged_at and not p.bad_steps:
                p.rollbacks = 0
            self.saver.save_async(p.step, self.snapshot(), is_best=is_best)

    def snapshot(self) -> Snapshot:
        """Everything the run needs to go on from here."""
        p, step = self.state, self.step_fn
        p.loss = float(self._loss)
        p.recent_losses = [float(loss) for loss in self._recent_losses]
        p.seconds = time.perf_counter() - self._begun
        state = {
            "version": 1,
            **p.to_json(),
            "loader": self.dataloader.state_dict(),
            "scaler": step.scaler_state_dict(),
            "text_sha256": self.text_sha256,
            "inputs": list(self.inputs),
            "file_sizes": self.report.file_sizes(),
        }
        return Snapshot(
            model=model_state_dict(step.model, self.comm),
            optimizer=optimizer_state_dict(step.model, step.optimizer, self.comm),
            rng_state=rng_state_dict(step.device, self.comm),
            state=state,
        )

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """What is no training: its time does not count, and other ranks may have to wait for it."""
        with self._clock.paused(), self.comm.pause_stall_check():
            yield

    def _latest_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint of sound weights, and what to say about damaged ones.

        An older one, if there is one, where training diverged from the newest before.
        """
        store = self.saver.store

        def is_sound(path: Path) -> bool:
            return not read_state(path)["progress"].get("bad_steps")

        def look() -> tuple[str | None, list[str]]:
            path, warnings = store.latest(is_sound)
            if path is not None and step_from_path(path) == self._rolled_back_to:
                newest = path
                older, more = store.latest(lambda path: path != newest and is_sound(path))
                path, warnings = older or newest, warnings + more
            return None if path is None else path.as_posix(), warnings

        path, warnings = self.comm.broadcast_from_rank0(look)
        return path and Path(path), warnings

    def _start_counting(self) -> None:
        """Set the running sums to what `progress` says."""
        p, device = self.state, self.step_fn.device
        size = max(1, min(self.config.eval_every or MAX_RECENT_LOSSES, MAX_RECENT_LOSSES))
        self._recent_losses = deque(
            (torch.tensor(loss, device=device) for loss in p.recent_losses), maxlen=size
        )
        self.loss_monitor.reset(p.bad_steps)
        self._loss = torch.tensor(p.loss, device=device)
        self._logged = p.step

    def _log(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        p = self.state
        p.loss = float(loss)
        # A clock may stand still, or be set back.
        seconds = max(self._clock.lap() / (p.step - self._logged), 1e-9)
        self._logged = p.step
        self.report.log_step(
            {
                "step": step,
                "loss": p.loss,
                "dt_ms": 1000 * seconds,
                "tok_per_sec": self.config.tokens_per_step / seconds,
                "norm": float(norm),
                "lr": lr,
                "epoch": self.dataloader.epoch,
            }
        )
