"""Evaluate the best checkpoint at the end of training, as `gptforge eval` does.

Evaluations during training may read only a part of the held-out text, `--eval_tokens`. This one
reads all of it, so that a run ends with the loss that `gptforge eval RUN` prints.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gptforge.checkpoint.format import MODEL, read_tensors, resolve_checkpoint, step_from_path
from gptforge.checkpoint.state_dict import StateDict, load_model_state_dict
from gptforge.errors import UserError
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.report.format import ValLoss, format_duration
from gptforge.report.log_handler import RESULT
from gptforge.shell import quote, shown
from gptforge.training.signals import StopReason, agree_on_signal

if TYPE_CHECKING:
    from gptforge.training.trainer import Trainer

MAX_SECONDS, MAX_FRACTION = 60.0, 0.1
"""Limit after the last step: the longer of these seconds and this fraction of the training time."""
MAX_SECONDS_AFTER_STOP = 10.0  # limit after a signal or the time limit
NOTICE_SECONDS = 3.0  # an evaluation that takes longer is announced


def evaluate_best(trainer: "Trainer", reason: StopReason) -> StopReason:
    """Evaluate the best checkpoint, which `load` opens, on all held-out text; a collective.

    Call it after the last save: it may leave the weights of another checkpoint in the model. An
    evaluation that would take too long is left to `gptforge eval`, and the report says so.

    Returns:
        `reason`, or the signal that stopped this evaluation of a run that is otherwise finished: a
        resumed run evaluates again.
    """
    if trainer.val_evaluator is None:
        return reason
    report, evaluator = trainer.report, trainer.val_evaluator.full()
    has_stopped = reason not in ("finished", "early_stop")
    seconds = _estimate_seconds(trainer, evaluator)
    limit = MAX_SECONDS_AFTER_STOP
    if not has_stopped:
        limit = max(MAX_SECONDS, MAX_FRACTION * trainer.state.seconds)
    name, is_quick = trainer.comm.broadcast_from_rank0(
        lambda: (resolve_checkpoint(report.run_dir.as_posix()).name, seconds <= limit)
    )
    path, num_tokens = trainer.saver.store.folder / name, f"{evaluator.num_tokens:,}"
    score = trainer.full_score
    if score is None and is_quick:
        if seconds > NOTICE_SECONDS:
            again = " again" if reason in ("interrupted", "terminated") else ""
            report.log(
                f"Saved. Evaluating {name} on all {num_tokens} held-out tokens takes about "
                f"{format_duration(seconds)}; Ctrl-C{again} skips it"
            )
        score = _evaluate(trainer, evaluator, path, _stop_condition(trainer, has_stopped))
        signal = agree_on_signal(trainer.stop_signal, trainer.comm)
        if score is None and signal and not has_stopped:
            reason = signal
    if score is not None:
        report.set_final_eval(step_from_path(path), score)
        return reason
    report.log_line(
        f"{name} was not evaluated on all {num_tokens} held-out tokens: {report.program} eval "
        f"{quote(shown(report.run_dir))} does that, in about {format_duration(seconds)}",
        RESULT,
    )
    return reason


def _estimate_seconds(trainer: "Trainer", evaluator: ValEvaluator) -> float:
    """Estimate the time of an evaluation from earlier ones or from the training steps."""
    if evaluator.seconds_per_sequence < math.inf:
        return evaluator.seconds_per_sequence * evaluator.num_sequences
    # Stopped before any evaluation. The forward is a third of a step's FLOPs.
    steps = evaluator.num_tokens / trainer.config.tokens_per_step / 3
    return trainer.state.seconds / trainer.state.step * steps


def _stop_condition(trainer: "Trainer", has_stopped: bool) -> Callable[[], bool]:
    """Whether to stop an evaluation that starts now: on a signal, or late after a stop."""
    deadline = time.perf_counter() + MAX_SECONDS_AFTER_STOP

    def should_stop() -> bool:
        stop = trainer.stop_signal.stop_reason()
        if stop in ("interrupted", "terminated"):
            return True
        return time.perf_counter() > deadline and (has_stopped or stop == "time_limit")

    return should_stop


def _evaluate(
    trainer: "Trainer", evaluator: ValEvaluator, path: Path, should_stop: Callable[[], bool]
) -> ValLoss | None:
    """The loss of a checkpoint; None if the evaluation is stopped or the checkpoint is damaged."""
    step_fn, comm = trainer.step_fn, trainer.comm
    tensors: StateDict = {}

    def read() -> str:
        try:
            tensors.update(read_tensors(path, MODEL))
        except (UserError, OSError) as error:
            return str(error)
        return ""

    with trainer.timer.exclude(), step_fn.ema_weights():
        if path != trainer.saver.store.path_of(trainer.state.step):
            if problem := comm.broadcast_from_rank0(read):
                trainer.report.log(f"warning: {problem}", logging.WARNING)
                return None
            load_model_state_dict(step_fn.model, tensors, source=path.as_posix(), comm=comm)
        score = evaluator.evaluate(
            step_fn.root_module, step_fn.precision, comm, should_stop=should_stop
        )
    return score if score.is_complete else None
