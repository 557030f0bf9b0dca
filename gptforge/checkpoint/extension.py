"""Where a run resumes if --max_steps was raised, and what its learning rate does there."""

from pathlib import Path
from typing import Any

from gptforge.checkpoint.format import find_corruption, read_config, read_state, step_from_path
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.optim.schedule import Schedule

LR_TOLERANCE = 0.05
"""A relative change of the learning rate that is not worth a warning."""


def extend_run(
    store: CheckpointStore, latest: Path, config: Config
) -> tuple[Path, dict[str, Any], str]:
    """Choose the checkpoint from which a run resumes with more steps; changes no file.

    Args:
        store: the checkpoints.
        latest: the latest intact one.
        config: the new configuration, with a larger max_steps than that of `latest`.

    Returns:
        The checkpoint: `latest`, or the one from before the decay of wsd. The counters of
        `TrainState` that are to replace those of the checkpoint. A line about the learning rate.
    """
    old, step = read_config(latest), step_from_path(latest)
    schedule, longer = Schedule.from_config(old), Schedule.from_config(config)
    raised = f"--max_steps raised from {old.max_steps} to {config.max_steps}"
    # Or the evaluations before would end the longer run.
    counters: dict[str, Any] = {"evals_since_best": 0}
    advice = "a run with --schedule wsd can be extended without a jump"
    if schedule.stable_end is not None and step > schedule.stable_end:
        start = store.path_of(schedule.stable_end)
        if find_corruption(start) is None:
            counters |= _best_and_save(latest, start)
            return start, counters, (
                f"{raised}: resuming from {start.name}, before the decay of the learning rate; "
                f"the {step - schedule.stable_end} steps after it are dropped and trained again"
            )  # fmt: skip
        advice = f"there is no intact {start.name}, from before the decay, to resume from"
    lr, new_lr = schedule.lr(step), longer.lr(step)
    jump = ""
    if abs(new_lr - lr) > LR_TOLERANCE * lr:
        jump = (
            f" and jumps from {lr:.2g} to {new_lr:.2g} at step {step}: {advice}; --restart "
            "trains all steps on one schedule"
        )
    return latest, counters, f"{raised}: the learning rate follows the new schedule from here{jump}"


def _best_and_save(latest: Path, start: Path) -> dict[str, Any]:
    """Keep the best checkpoint, if only a longer run will beat it, and save that at once."""
    progress, pending = read_state(latest)["progress"], read_state(start).get("pending", [])
    counters = {"pending": [*pending, *(["save"] if "save" not in pending else [])]}
    if progress["best_loss"] is not None:
        counters |= {name: progress[name] for name in ("best_loss", "best_step")}
    return counters
