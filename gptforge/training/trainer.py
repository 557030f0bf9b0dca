"""The training loop."""

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gptforge.checkpoint.async_saver import AsyncSaver
from gptforge.config import SEED_LIMIT, Config
from gptforge.data.dataloader import DataLoader, replace_tokens
from gptforge.distributed import AsyncMax, Comm
from gptforge.errors import RunError
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.inference.language_model import LanguageModel
from gptforge.lock import FolderLock
from gptforge.optim.schedule import learning_rate, ramped_dropout
from gptforge.report.format import ValLoss, format_duration
from gptforge.report.log_handler import RESULT
from gptforge.report.metrics import Event
from gptforge.report.run_report import RunReport
from gptforge.shell import shown
from gptforge.tokenizers import Tokenizer
from gptforge.training.final_evaluation import evaluate_best
from gptforge.training.float8_warmup import switch_precision
from gptforge.training.loss_monitor import Anomaly, LossMonitor
from gptforge.training.rollback import HINT, MAX_BAD_STEPS, rollback
from gptforge.training.signals import STOP_REASONS, StopReason, StopSignal
from gptforge.training.state import MAX_RECENT_LOSSES, TrainState, snapshot
from gptforge.training.timer import StepTimer
from gptforge.training.train_step import TrainStep

SAMPLE_TOKENS = 200


@dataclass
class Trainer:
    """Trains from `state` to the last step; built by `builders.build_trainer`."""

    config: Config
    step_fn: TrainStep
    dataloader: DataLoader
    val_evaluator: ValEvaluator | None
    tokenizer: Tokenizer
    saver: AsyncSaver
    report: RunReport
    stop_signal: StopSignal
    loss_monitor: LossMonitor
    patience: int  # evaluations without a better held-out loss after which to stop; 0: never
    text_sha256: str  # hash of the training text: a run resumes only with the same text
    file_fingerprints: Mapping[str, list[str]]  # entries of state.json, by split
    state: TrainState
    lock: FolderLock | None  # lock of the run folder, released when training ends
    comm: Comm  # the ranks; report and saver do nothing except on rank 0, which alone has the lock
    stop_consensus: AsyncMax  # makes all ranks stop at the same step
    timer: StepTimer

    _start_time: float = field(init=False)
    rolled_back_to: int = field(init=False, default=-1)
    """Step of the last checkpoint that was rolled back to."""
    full_score: ValLoss | None = field(init=False, default=None)
    """Loss of the best checkpoint on all held-out text, if that is known."""
    is_save_deferred: bool = field(init=False, default=False)
    """Whether to save after the next good step, because a save was due during bad steps."""

    def fit(self) -> StopReason:
        """Train to the last step or until a reason to stop; the state is saved either way."""
        # Until the last line is written: a second signal must not cut the report short.
        with self.stop_signal:
            with self.report.console, self.report.trackers:
                reason = self._train()
                self.saver.wait()
                self.report.log_saves(self.saver.poll())
                # After the save, so that another signal loses nothing.
                self.stop_signal.mark_saved(reason)
                if not self.report.is_teacher:
                    reason = evaluate_best(self, reason)
            self._finish(reason)
        return reason

    def close(self) -> None:
        """Complete a running save, end the data loader's thread and unlock the run folder."""
        self.dataloader.close()
        with contextlib.suppress(Exception):
            self.saver.wait()
        if self.lock is not None:
            self.lock.release()

    def _train(self) -> StopReason:
        """The training loop; returns why it ended, after the last save has started."""
        self._start_time = time.perf_counter() - self.state.seconds
        self.reset_history()
        reason = self.end_reason()
        if reason is not None:
            # After a crash between the last save and `_finish`, old checkpoints may be left.
            self.saver.prune()
        while reason is None:
            # A run that was interrupted in an evaluation resumes with it, not with a step.
            if not self.state.partial_eval and (diverged := self.train_step()):
                rollback(self, diverged)
                continue
            is_best = False
            if self.state.partial_eval or self.is_due(self.config.eval_every):
                is_best = self.evaluate()
            if self.is_due(self.config.sample_every):
                self.sample()
            reason = self.end_reason() or self.stop_reason()
            if reason:
                self._log_stop(reason)
            if reason or is_best or (self.is_save_due and not self.loss_monitor.bad_steps):
                self.save(is_best=is_best)
            elif self.is_save_due:
                self.is_save_deferred = True
            self.report.log_saves(self.saver.poll())
        return reason

    def _finish(self, reason: StopReason) -> None:
        """Write the report, and unlock the run folder."""
        self.report.plot(force=True)
        state = self.state
        self.report.finish(
            reason, step=state.step, epochs=self.dataloader.epoch, seconds=state.seconds,
            has_val=self.val_evaluator is not None,
        )  # fmt: skip
        if self.lock is not None:
            self.lock.release()
        if reason not in ("finished", "early_stop"):
            saved = self.saver.store.path_of(state.step)
            self.report.log(f"Saved: {shown(saved)}", RESULT)
        elif not any(map(math.isfinite, (state.loss, state.best_loss))):
            raise RunError(
                f"training diverged before step {state.step}, with no finite loss: "
                f"{HINT}; --restart starts from scratch"
            )

    def train_step(self) -> Anomaly | None:
        """Make one optimizer step, and log it if due.

        Returns the anomaly of the latest bad step if training has diverged, which on a GPU is known
        a few steps later.
        """
        c, step, position = self.config, self.state.step, self.dataloader.position
        lr = learning_rate(c, step)
        switch_precision(self)
        inputs, targets = self.dataloader.next_batch()
        if c.token_noise:
            inputs = replace_tokens(inputs, c.token_noise)
        if c.dropout_ramp:
            self.step_fn.backend.set_dropout(ramped_dropout(c, step))
        loss, norm = self.step_fn(inputs, targets, lr=lr)
        # The device is still computing: everything below overlaps with it unless it reads `loss`.
        self.state.step += 1
        if self.steps_left:
            self.dataloader.prefetch_to_device()
        # Reading the loss syncs with the device, so it is read only when a line is due.
        if step % c.log_every == 0 or not self.steps_left:
            self._log(step, loss, norm, lr)
        self.report.console.update(self.state.step, f"loss {self.state.loss:.3f}")
        anomalies = self.loss_monitor.update(step, position, loss, norm)
        if self.is_save_due or self.is_due(c.eval_every) or self.is_due(c.sample_every):
            # Evaluating and saving depend on whether this step was good, so wait for its loss.
            anomalies += self.loss_monitor.flush()
        self._log_anomalies(anomalies)
        return next((a for a in reversed(anomalies) if a.bad_steps >= MAX_BAD_STEPS), None)

    def stop_reason(self) -> StopReason | None:
        """Why to stop now, the same on all ranks, or None."""
        priority = STOP_REASONS.index(self.stop_signal.stop_reason())
        return STOP_REASONS[self.stop_consensus.update(priority)]

    def end_reason(self) -> StopReason | None:
        """Why no further step is to be made, the same on all ranks, or None."""
        if self.state.partial_eval:
            return None  # it is completed first, and may be the one that ends the run
        if not self.steps_left:
            return "finished"
        return "early_stop" if 0 < self.patience <= self.state.evals_since_best else None

    @property
    def steps_left(self) -> int:
        """Steps still to make."""
        return self.config.max_steps - self.state.step

    def is_due(self, every: int) -> bool:
        """Whether something that is due at every `every` steps, and at the end, is due now."""
        is_due = self.end_reason() is not None or (every > 0 and self.state.step % every == 0)
        return is_due and not self.state.partial_eval

    @property
    def is_save_due(self) -> bool:
        """Whether to save now, or after the next good step."""
        is_protected = self.state.step in self.saver.protected_steps
        return self.is_save_deferred or is_protected or self.is_due(self.config.save_every)

    def evaluate(self) -> bool:
        """Compute the validation loss; returns whether it is the lowest so far.

        If that is interrupted, `state.partial_eval` has the sums to continue from. Without
        validation data, the mean of the recent training losses takes its place.
        """
        state, step_fn, evaluator = self.state, self.step_fn, self.val_evaluator
        with self.timer.exclude(), step_fn.ema_weights():
            if evaluator is None:
                is_best = state.count_eval(self.config, self.loss_monitor.mean_loss())
            else:
                score = evaluator.evaluate(
                    step_fn.root_module, step_fn.precision, self.comm,
                    should_stop=self.stop_signal.should_stop, partial=state.partial_eval,
                )  # fmt: skip
                state.partial_eval = None if score.is_complete else score
                if not score.is_complete:
                    return False
                is_best = state.count_eval(self.config, score.loss)
                if is_best:
                    self.full_score = score if evaluator.fraction == 1 else None
                self.report.log_eval(
                    state.step, score, epoch=self.dataloader.epoch, is_best=is_best
                )
            if self.steps_left:  # else `fit` plots right after
                self.report.plot()
        return is_best

    def sample(self) -> None:
        """Log a sample, drawn with a separate RNG so that training is not affected."""
        if self.report.is_teacher:
            return
        with self.timer.exclude(), self.step_fn.ema_weights():
            model = self.step_fn.unsharded_model()
            if model is None:
                return
            seed = (self.config.seed + self.state.step) % SEED_LIMIT
            lm = LanguageModel(model, self.tokenizer, warn_on_context_shift=False)
            text = lm.generate("", SAMPLE_TOKENS, seed=seed)
            self.report.log_sample(self.state.step, text, is_last=bool(self.end_reason()))

    def save(self, *, is_best: bool) -> None:
        """Start writing a checkpoint in the background."""
        with self.timer.exclude():
            state = self.state
            self.is_save_deferred = False
            self._log_anomalies(self.loss_monitor.flush())
            if is_best:
                # A new best loss shows that the weights are good, even right after bad steps.
                self.loss_monitor.bad_steps = 0
            state.bad_steps = self.loss_monitor.bad_steps
            if state.step > state.diverged_at and not state.bad_steps:
                state.rollbacks = 0
            state.loss = self.loss_monitor.last_loss
            state.recent_losses = list(self.loss_monitor.losses)
            state.seconds = time.perf_counter() - self._start_time
            # Logged before the sizes of the logs are taken: resuming from here keeps the event.
            self.saver.wait()
            self.report.log_saves(self.saver.poll())
            saved = snapshot(
                state, self.step_fn, self.dataloader, self.comm, text_sha256=self.text_sha256,
                **self.file_fingerprints, file_sizes=self.report.file_sizes(),
            )  # fmt: skip
            self.saver.save_async(state.step, saved, is_best=is_best)

    def reset_history(self) -> None:
        """Reset the loss history and the timer to `state`."""
        keep = 0
        if self.val_evaluator is None:
            keep = min(self.config.eval_every or MAX_RECENT_LOSSES, MAX_RECENT_LOSSES)
        self.loss_monitor.reset(self.state, keep_losses=keep)
        self.timer.restart(self.state.step)

    def _log_stop(self, reason: StopReason) -> None:
        """Log why, before the save: a resumed run truncates the log to its length at the save."""
        if reason == "finished":
            return
        if reason in ("interrupted", "terminated") and not self.stop_signal.should_stop():
            self.report.log("Stopping: another rank got a signal.")
        state, max_steps = self.state, self.config.max_steps
        if reason == "early_stop":
            seconds = (time.perf_counter() - self._start_time) / state.step * self.steps_left
            line = (
                f"Stopped early at step {state.step} of {max_steps}: no better held-out loss since "
                f"step {state.best_step} (saved about {format_duration(seconds)}); --patience 0 "
                "trains on"
            )
        else:
            by = self.stop_signal.stopped_by(reason)
            line = f"Stopped by {by} at step {state.step} of {max_steps}"
        self.report.log_line(line, RESULT)

    def _log(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        self.state.loss = float(loss)
        seconds = self.timer.seconds_per_step(self.state.step)
        self.report.log_step(
            {
                "step": step,
                "loss": self.state.loss,
                "dt_ms": 1000 * seconds,
                "tok_per_sec": self.config.tokens_per_step / seconds,
                "norm": float(norm),
                "lr": lr,
                "epoch": self.dataloader.epoch,
            }
        )

    def _log_anomalies(self, anomalies: Sequence[Anomaly]) -> None:
        """Log steps with a spike, NaN or Inf, with the training sequences that they saw."""
        for a in anomalies:
            epoch = a.position / self.dataloader.num_sequences
            sequence_ids = self.dataloader.sequence_ids_at(a.position)
            event: Event = {"kind": a.kind, "step": a.step, "loss": a.loss, "norm": a.norm}
            event |= {"epoch": epoch, "windows": sequence_ids}
            self.report.log_anomaly(event, z_score=a.z_score)
