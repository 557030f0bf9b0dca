"""Opens a run folder: for a new run, to resume one, or to find it finished."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gptforge import files
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.out_dir import (
    METRICS,
    TEACHERS,
    check_out_dir,
    check_writable,
    has_files,
    has_line,
)
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import TEXT_FIELDS, Config, resume_conflicts
from gptforge.config_file import read_toml
from gptforge.errors import UserError
from gptforge.optim.schedule import learning_rate, ramped_dropout, stable_end
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

LR_TOLERANCE = 0.05  # a relative change of the learning rate that is not worth a warning


@dataclass(frozen=True)
class OpenedRun:
    """What a run folder holds, and how to start from it."""

    status: Literal["new", "resume", "finished"]
    config: Config  # as requested, adapted to a run that resumes
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    # Fields of `TrainState` that replace those of the checkpoint.
    counters: dict[str, Any] = field(default_factory=dict)
    drops_decay: bool = False  # resume from before the decay, and drop the checkpoints after it
    moves_old_run: bool = False  # to a backup, before this one starts

    def to_json(self) -> dict[str, Any]:
        """For ranks that cannot look themselves: the folder may be on another machine."""
        path = None if self.checkpoint is None else self.checkpoint.as_posix()
        return vars(self) | {"config": vars(self.config), "checkpoint": path}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "OpenedRun":
        """Inverse of `to_json`."""
        path, notices = record["checkpoint"], tuple(record["notices"])
        checkpoint = None if path is None else Path(path)
        config = Config(**record["config"])
        return cls(**{**record, "config": config, "checkpoint": checkpoint, "notices": notices})


def open_run(
    config: Config, *, explicit: Collection[str], tokenizer: Tokenizer, text_sha256: str
) -> OpenedRun:
    """Decide between a new run, resuming and a finished run; repairs but never deletes.

    `explicit` are the fields that the user set. A UserError if the folder holds something else, or
    a run with another configuration.
    """
    check_out_dir(config)
    folder = Path(config.out_dir)
    if config.restart and has_files(folder):
        return OpenedRun("new", config, moves_old_run=True)
    store, metrics = CheckpointStore(folder / "checkpoints"), folder / METRICS
    latest, notices = store.latest()
    if latest is None:
        if any(store.folder.glob("step-*")) or has_line(metrics, '"event": "save"'):
            problems = f"{'; '.join(notices)}; " if notices else ""
            raise UserError(
                f"{problems}{folder.as_posix()} holds a run without an intact checkpoint: put one "
                "back, start from scratch with --restart, or start another run from its weights, "
                f"if these are intact, with --init_from {quote(folder.as_posix())}"
            )
        # It ended before its first save: start from scratch in place.
        return OpenedRun("new", config)
    old, state = checkpoints.read_config(latest), checkpoints.read_state(latest)
    store.repair_links(latest)
    known_best: dict[str, Any] = {}
    if renamed := store.renamed_best(latest):
        best = checkpoints.read_state(renamed)["progress"]
        known_best = {name: best[name] for name in ("best_loss", "best_step")}
    requested_steps = config.max_steps
    config = resume_config(
        latest, config, explicit=explicit, tokenizer=tokenizer, text_sha256=text_sha256
    )
    if requested_steps < config.max_steps:
        notices.append(
            f"--max_steps {requested_steps} is less than the {config.max_steps} that this run has "
            f"by now: it keeps {config.max_steps}"
        )
    progress = state["progress"]
    if config.max_steps > old.max_steps:
        check_writable(folder)
        checkpoint, counters, notice = _extend_run(store, latest, config)
        notice += _dropout_change(old, config, step=checkpoints.step_from_path(checkpoint))
        return OpenedRun(
            "resume", config, checkpoint, checkpoints.read_state(checkpoint), (*notices, notice),
            counters=counters | known_best, drops_decay=checkpoint != latest,
        )  # fmt: skip
    is_pending = progress.get("unjudged") or state.get("pending")
    stopped_early = has_line(metrics, '"reason": "early_stop"')
    # Unless a higher patience lets it train on.
    is_final = config.patience < 0 or 0 < config.patience <= progress.get("evals_since_best", 0)
    is_done = progress["step"] >= config.max_steps or (stopped_early and is_final)
    # A signal may have stopped the final evaluation of a run with all its steps.
    has_ended = stopped_early or has_line(metrics, '"reason": "finished"')
    if is_done and not is_pending and has_ended:
        return OpenedRun("finished", config, latest, state, tuple(notices))
    check_writable(folder)
    return OpenedRun("resume", config, latest, state, tuple(notices), counters=known_best)


def _extend_run(
    store: CheckpointStore, latest: Path, config: Config
) -> tuple[Path, dict[str, Any], str]:
    """Choose the checkpoint from which a run resumes with a larger max_steps; changes no file.

    Returns:
        `latest`, or the checkpoint from before the decay of wsd; the counters of `TrainState` that
        replace those of the checkpoint; and a line about the learning rate.
    """
    old, step = checkpoints.read_config(latest), checkpoints.step_from_path(latest)
    raised = f"--max_steps raised from {old.max_steps} to {config.max_steps}"
    # Or the evaluations before would end the longer run.
    counters: dict[str, Any] = {"evals_since_best": 0}
    advice = "a run with --schedule wsd can be extended without a jump"
    if (end := stable_end(old)) is not None and step > end:
        start = store.path_of(end)
        if checkpoints.find_corruption(start) is None:
            # Only a longer run will beat it.
            best = checkpoints.read_state(latest)["progress"]
            if best["best_loss"] is not None:
                counters |= {name: best[name] for name in ("best_loss", "best_step")}
            return start, counters, (
                f"{raised}: resuming from {start.name}, before the decay of the learning rate; "
                f"the {step - end} steps after it are dropped and trained again"
            )  # fmt: skip
        advice = f"there is no intact {start.name}, from before the decay, to resume from"
    if old.schedule == "constant":
        return latest, counters, raised
    lr, new_lr = learning_rate(old, step), learning_rate(config, step)
    jump = ""
    if abs(new_lr - lr) > LR_TOLERANCE * lr:
        jump = (
            f" and jumps from {lr:.2g} to {new_lr:.2g} at step {step}: {advice}; --restart "
            "trains all steps on one schedule"
        )
    return latest, counters, f"{raised}: the learning rate follows the new schedule from here{jump}"


def _dropout_change(old: Config, config: Config, *, step: int) -> str:
    """How dropout changes at a step of a run with a larger max_steps, which stretches a ramp."""
    if not old.dropout_ramp:
        return ""
    dropout, new_dropout = ramped_dropout(old, step), ramped_dropout(config, step)
    if new_dropout >= dropout:
        return ""
    return f"; by --dropout_ramp, dropout falls from {dropout:.2g} to {new_dropout:.2g} there"


def resume_config(
    checkpoint: Path,
    config: Config,
    *,
    explicit: Collection[str],
    tokenizer: Tokenizer,
    text_sha256: str,
) -> Config:
    """The configuration with which `config` resumes the run of a checkpoint; changes no file.

    A run whose max_steps was raised keeps them, so the command that started it still works.

    Raises:
        UserError: saying what differs in the run: configuration, tokenizer or text.
    """
    old, folder = checkpoints.read_config(checkpoint), Path(config.out_dir)
    kept = {name: getattr(old, name) for name in {"warmup_steps", "patience"}.difference(explicit)}
    kept["max_steps"] = max(config.max_steps, old.max_steps)
    # A tokenizer is compared by content, not by path.
    kept["tokenizer"] = old.tokenizer
    has_other_tokenizer = checkpoints.read_tokenizer(checkpoint).to_json() != tokenizer.to_json()
    if has_other_tokenizer and "vocab_size" not in explicit:
        kept["vocab_size"] = old.vocab_size  # it follows the tokenizer
    config = dataclasses.replace(config, **kept)
    conflicts = resume_conflicts(old, config)
    if has_other_tokenizer:
        conflicts.append("tokenizer: not the one that the run was started with")
    if checkpoints.read_state(checkpoint)["text_sha256"] != text_sha256:
        flags = [name for name in TEXT_FIELDS if name in explicit]
        # The hash may depend on the tokenizer, too.
        if flags or not (has_other_tokenizer and "tokenizer" in explicit):
            name = " or ".join(flags) or "input"
            conflicts.append(f"{name}: not the text that {folder.as_posix()} was trained on")
    if conflicts:
        hint = "choose another --out_dir, or --restart to move it to a backup"
        # --resume takes neither; a teacher resumes by the configuration of its student.
        run = folder.parents[1] if folder.parent.name == TEACHERS else folder
        if config.config and Path(config.config) in {d / checkpoints.CONFIG for d in (run, folder)}:
            names = {name for text in conflicts for name in text.partition(":")[0].split()}
            fix = "leave these flags out" if names.intersection(explicit) else "restore the text"
            hint = f"{fix} to resume it, or start a new run without --resume"
        raise UserError(
            f"{folder.as_posix()} holds a run with another configuration "
            f"({'; '.join(conflicts)}): {hint}"
        )
    return config


def is_run_of(folder: Path, preset: str, text: str) -> bool:
    """Whether a folder has a run with this preset and this `--input`."""
    try:
        values, _ = read_toml(folder / checkpoints.CONFIG)
    except UserError:
        return False
    is_same_text = files.real_path(str(values.get("input"))) == files.real_path(text)
    return is_same_text and values.get("preset") == preset
