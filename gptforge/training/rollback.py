"""Recover from divergence: restore the last good checkpoint, and skip the data since then."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from gptforge.checkpoint.async_saver import SavedCheckpoint
from gptforge.checkpoint.format import read_state, step_from_path
from gptforge.checkpoint.store import CheckpointStore
from gptforge.distributed import Comm
from gptforge.errors import RunError
from gptforge.training.loss_monitor import Anomaly
from gptforge.training.state import restore

if TYPE_CHECKING:
    from gptforge.training.trainer import Trainer

MAX_BAD_STEPS = 5  # training rolls back after this many consecutive steps with NaN or Inf
MAX_ROLLBACKS = 3
HINT = "try a lower --max_lr or a longer --warmup_steps, and check the training text"


def rollback(trainer: "Trainer", anomaly: Anomaly) -> None:
    """Roll a run back, with its logs; a collective.

    Args:
        trainer: of the run that diverged.
        anomaly: of the last of its bad steps.

    Raises:
        RunError: if there is no checkpoint, or if `MAX_ROLLBACKS` rollbacks did not help.
    """
    old, comm, store = trainer.state, trainer.comm, trainer.saver.store
    report = trainer.report
    with trainer.timer.exclude():
        trainer.saver.wait()
        report.log_saves(trainer.saver.poll())
        position, rollbacks = trainer.dataloader.position, old.rollbacks + 1
        path, warnings = _latest_good_checkpoint(store, comm, avoid_step=trainer.rolled_back_to)
        for warning in warnings:
            report.log(f"note: {warning}", logging.WARNING)
        if path is None or rollbacks > MAX_ROLLBACKS:
            reason = f"{rollbacks - 1} rollbacks did not help" if path else "nothing was saved yet"
            raise RunError(
                f"no finite loss for {anomaly.bad_steps} steps in a row, and {reason}: training "
                f"diverged at step {anomaly.step}: {HINT}"
            )
        state = trainer.state = restore(path, trainer.step_fn, trainer.dataloader, comm)
        state.rollbacks = rollbacks
        state.diverged_at = max(old.diverged_at, old.step)
        trainer.rolled_back_to, trainer.is_save_deferred = state.step, False
        comm.broadcast_from_rank0(lambda: store.discard_after(state.step))
        report.truncate(
            SavedCheckpoint(state.step, path.name, is_best=state.best_step == state.step),
            comm.broadcast_from_rank0(lambda: read_state(path)["file_sizes"]),
            best=(old.best_step, old.best_loss),
        )
        bad_steps = list(range(anomaly.step + 1 - anomaly.bad_steps, anomaly.step + 1))
        skipped = (trainer.dataloader.position, position)  # in training order
        report.log_line(
            f"no finite loss in steps {bad_steps[0]} to {bad_steps[-1]}: back to {path.name}; "
            f"training sequences {skipped[0]} to {skipped[1] - 1} are skipped",
            logging.WARNING,
        )
        facts = {"checkpoint": path.name, "bad_steps": bad_steps, "left_out": skipped}
        report.log_event("anomaly", kind="return", step=state.step, **facts)
        # Resume at the data after the divergence: with the batches that led there, training would
        # likely diverge again (PaLM, Chowdhery et al., 2022, section 5.1).
        trainer.dataloader.load_state_dict({"position": position})
        if old.best_loss < state.best_loss:
            # The best checkpoint is later than the restored one, and stays the best.
            state.best_loss, state.best_step = old.best_loss, old.best_step
            report.log(
                f"note: step {state.best_step} stays the best so far, with a loss of "
                f"{state.best_loss:.4f}"
            )
    trainer.reset_history()


def _latest_good_checkpoint(
    store: CheckpointStore, comm: Comm, *, avoid_step: int
) -> tuple[Path | None, list[str]]:
    """Find the latest checkpoint that was not saved in a streak of bad steps.

    Training already diverged from the checkpoint of `avoid_step`: an older one is preferred to it.
    Returns its path, and warnings about corrupt checkpoints.
    """

    def is_good(path: Path) -> bool:
        return not read_state(path)["progress"].get("bad_steps")

    def find() -> tuple[str | None, list[str]]:
        path, warnings = store.latest(lambda p: step_from_path(p) != avoid_step and is_good(p))
        if path is None:
            path, warnings = store.latest(is_good)
        return None if path is None else path.as_posix(), warnings

    path, warnings = comm.broadcast_from_rank0(find)
    return None if path is None else Path(path), warnings
