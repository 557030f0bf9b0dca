"""The training loop. It receives finished parts and never builds them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from gptforge.checkpoint.store import CheckpointStore, Snapshot
from gptforge.checkpoint.tensors import generator_tensors, model_tensors, optimizer_tensors
from gptforge.config import Config
from gptforge.data.loader import Loader
from gptforge.errors import RunError
from gptforge.evaluate.heldout import HeldOut
from gptforge.generate.language_model import LanguageModel
from gptforge.hardware import synchronize
from gptforge.optim.schedule import warmup_cosine
from gptforge.report.run_report import RunReport
from gptforge.tokenizers import Tokenizer
from gptforge.train.guards import Reason, StopGuard
from gptforge.train.step import TrainStep

SAMPLE_TOKENS = 200


@dataclass
class Progress:
    """How far a run has come; it travels in every checkpoint."""

    step: int = 0
    """Updates made."""
    loss: float = math.nan
    """Mean training loss of the last update."""
    best_loss: float = math.inf
    """Lowest loss judged: held out, or training where nothing is."""
    best_step: int = 0
    """Updates made when it was judged."""
    loss_sum: float = 0.0
    """Training losses since the last judgement, summed."""
    loss_count: int = 0
    """How many they are."""
    seconds: float = 0.0
    """Wall time of training, over all sessions."""


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
    store: CheckpointStore
    report: RunReport
    guard: StopGuard
    config_text: str
    """What config.toml holds; a copy goes into every checkpoint."""
    text_sha256: str
    """Of the training text: a run goes on with the same one only."""
    progress: Progress

    _clock: Stopwatch = field(init=False)
    _begun: float = field(init=False)
    _logged: int = field(init=False)
    _loss_sum: Tensor = field(init=False)
    _last_loss: Tensor = field(init=False)

    def run(self) -> Reason:
        """Train to the last step, or until asked to stop; either way the state is saved."""
        device = self.train_step.device
        self._loss_sum = torch.tensor(self.progress.loss_sum, device=device)
        self._logged = self.progress.step
        self._begun = time.perf_counter() - self.progress.seconds
        self._clock = Stopwatch(lambda: synchronize(device))
        reason: Reason | None = None
        with self.guard, self.report.console:
            while reason is None:
                self.learn()
                is_best = self.is_due(self.config.eval_every) and self.judge()
                if self.is_due(self.config.sample_every):
                    self.sample()
                reason = self.guard.wish() if self.steps_left else "finished"
                if reason or is_best or self.is_due(self.config.save_every):
                    self.save(is_best=is_best)
        self.report.end(
            reason,
            step=self.progress.step,
            epochs=self.loader.epoch,
            seconds=self.progress.seconds,
        )
        self.report.redraw(force=True)
        return reason

    @property
    def steps_left(self) -> int:
        """Updates still to make."""
        return self.config.max_steps - self.progress.step

    def is_due(self, every: int) -> bool:
        """Whether something done each `every` updates, and at the end, is due; 0: at the end."""
        return not self.steps_left or (every > 0 and self.progress.step % every == 0)

    def learn(self) -> None:
        """Make one update; log it if its line is due."""
        c, step = self.config, self.progress.step
        lr = warmup_cosine(
            step,
            max_lr=c.max_lr,
            min_lr=c.min_lr,
            warmup_steps=c.warmup_steps,
            max_steps=c.max_steps,
        )
        inputs, targets = self.loader.next()
        loss, norm = self.train_step(inputs, targets, lr=lr)
        self._loss_sum += loss
        self.progress.step += 1
        self.progress.loss_count += 1
        # Reading a number off the device waits for it, so that is left for the steps that log.
        if step % c.log_every == 0 or not self.steps_left:
            self._log(step, loss, norm, lr)
        self.report.console.advance(self.progress.step, f"loss {self.progress.loss:.3f}")
        self._last_loss = loss

    def judge(self) -> bool:
        """Score the model, by held-out text where there is some; whether it is the best so far."""
        p = self.progress
        with self._clock.paused():
            if self.held_out is None:
                loss = float(self._loss_sum) / p.loss_count
            else:
                score = self.held_out.evaluate(self.train_step.model, self.train_step.precision)
                loss = score.loss
            is_best = loss < p.best_loss
            if is_best:
                p.best_loss, p.best_step = loss, p.step
            if self.held_out is not None:
                self.report.evaluated(
                    p.step,
                    loss=loss,
                    bits_per_byte=score.bits_per_byte,
                    epoch=self.loader.epoch,
                    is_best=is_best,
                )
            self.report.redraw()
        self._loss_sum.zero_()
        p.loss_count = 0
        return is_best

    def sample(self) -> None:
        """Have the model write a little, with dice of its own, so that training does not notice."""
        with self._clock.paused():
            writer = LanguageModel(self.train_step.model, self.tokenizer)
            text = writer.generate("", SAMPLE_TOKENS, seed=self.config.seed + self.progress.step)
            self.report.sampled(self.progress.step, text, is_last=not self.steps_left)

    def save(self, *, is_best: bool) -> None:
        """Write a checkpoint, point `last` and perhaps `best` at it, delete what is not kept."""
        with self._clock.paused():
            snapshot = self.snapshot()
            step = self.progress.step
            name = self.store.save(
                step, snapshot, tokenizer=self.tokenizer, config=self.config_text
            )
            if is_best:
                self.store.point("best", name)
            self.store.prune(self.config.keep)
            self.report.saved(step, name, is_best=is_best)

    def snapshot(self) -> Snapshot:
        """Everything the run needs to go on from here."""
        p, step = self.progress, self.train_step
        p.loss = self._finite(self._last_loss)
        p.loss_sum = float(self._loss_sum)
        p.seconds = time.perf_counter() - self._begun
        # JSON has no infinity: nothing judged yet is null.
        progress = asdict(p) | {"best_loss": p.best_loss if p.best_step else None}
        state = {
            "version": 1,
            "progress": progress,
            "loader": self.loader.state_dict(),
            "scaler": step.scaler_state(),
            "text_sha256": self.text_sha256,
            "file_sizes": self.report.sizes(),
        }
        return Snapshot(
            model=model_tensors(step.model),
            optimizer=optimizer_tensors(step.model, step.optimizer),
            generators=generator_tensors(step.device),
            state=state,
        )

    def _log(self, step: int, loss: Tensor, norm: Tensor, lr: float) -> None:
        p = self.progress
        p.loss = self._finite(loss)
        seconds = self._clock.lap() / (p.step - self._logged)
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

    def _finite(self, loss: Tensor) -> float:
        """The loss as a number; a RunError if it is none, before anything is saved over."""
        value = float(loss)
        if not math.isfinite(value):
            last = self.store.pointed("last")
            kept = f"{last.name} is from before" if last else "nothing had been saved yet"
            raise RunError(
                f"the training loss is {value} at step {self.progress.step - 1}: training broke "
                f"down; {kept}. A lower --max_lr or a longer --warmup_steps may help"
            )
        return value


def restore_progress(state: dict[str, float | None]) -> Progress:
    """Progress from a checkpoint's state."""
    known = {name: value for name, value in state.items() if value is not None}
    return Progress(**known)  # type: ignore[arg-type]
