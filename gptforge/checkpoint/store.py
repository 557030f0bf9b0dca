"""The `checkpoints/` folder of a run.

A checkpoint is written to a temporary folder and renamed.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gptforge import files
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.format import Snapshot, find_corruption, read_state, step_from_path
from gptforge.errors import RunError, UserError, explain_os_error
from gptforge.shell import shown
from gptforge.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

HEADROOM_BYTES = 8 * 2**20  # disk space for logs and plots besides a checkpoint
REPLACED = ".replaced"  # ends the hidden name of a checkpoint that another one replaces


class CheckpointStore:
    """The checkpoints of one run; `resume_command` is for errors."""

    def __init__(self, folder: Path, *, resume_command: str = "the same command") -> None:
        self.folder = folder
        self._resume_command = resume_command

    def save(self, step: int, snapshot: Snapshot, *, tokenizer: Tokenizer, config: str) -> str:
        """Write checkpoint `step-N`, complete or not at all, and link `last` to it.

        Returns its name; a RunError if the disk is full or fails, with earlier ones untouched.
        """
        name = self.path_of(step).name
        with self.disk_errors(name):
            try:
                self._save(name, snapshot, tokenizer, config)
            except FileNotFoundError:
                if self.folder.parent.is_dir():
                    raise
                self._save(name, snapshot, tokenizer, config)
            self.set_link("last", name)
        return name

    def _save(self, name: str, snapshot: Snapshot, tokenizer: Tokenizer, config: str) -> None:
        run_dir, partial = self.folder.parent, self.folder / f".{name}.partial"
        if not run_dir.is_dir():
            # Only this process still has the weights: save them, with what a resume needs.
            logger.warning(
                f"warning: {shown(run_dir)} was moved or deleted: training continues in a new "
                "folder of that name, without the earlier checkpoints and logs"
            )
            run_dir.mkdir(parents=True, exist_ok=True)
            files.atomic_write(run_dir / checkpoints.CONFIG, config)
        self.folder.mkdir(exist_ok=True)
        files.remove(partial)
        self.check_disk_space(snapshot.nbytes)
        partial.mkdir()
        try:
            checkpoints.save_checkpoint(
                partial, snapshot.tensors, tokenizer=tokenizer, config=config, state=snapshot.state
            )
            self._move_into_place(partial, name)
        finally:
            files.remove(partial)

    @contextmanager
    def disk_errors(self, name: str) -> Iterator[None]:
        """Turn an OSError into a RunError that says what is kept and how to resume."""
        try:
            yield
        except OSError as error:
            reason, fix = explain_os_error(error)
            where = shown(Path(error.filename or self.folder))
            kept = self._kept(fix or "check the disk")
            raise RunError(f"{where}: {reason}, while saving {name}: {kept}") from error

    def check_disk_space(self, nbytes: int) -> None:
        """Raise a RunError unless there is room for so many bytes and the logs."""
        needed, free = nbytes + HEADROOM_BYTES, files.free_disk_bytes(self.folder)
        if free is not None and free < needed:
            raise RunError(
                f"{shown(self.folder)}: a checkpoint and the logs take {needed / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free: {self._kept('free some space')}"
            )

    def latest(
        self, accept: Callable[[Path], bool] = lambda path: True
    ) -> tuple[Path | None, list[str]]:
        """The latest intact and accepted checkpoint; later, corrupt ones are renamed.

        Also returns a warning for each of these. Without a checkpoint to return, they keep their
        names: only the optimizer may be missing, and other commands still use the weights.
        """
        self._finish_replacing()
        corrupt: dict[Path, str] = {}
        for path in reversed(self.checkpoints()):
            if problem := find_corruption(path):
                corrupt[path] = f"{path.name} is damaged ({problem})"
            elif accept(path):
                return path, [
                    f"{warning}; renamed to {files.move_to_backup(other, 'damaged').name}"
                    for other, warning in corrupt.items()
                ]
        return None, list(corrupt.values())

    def path_of(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first, intact or not."""
        return checkpoints.list_checkpoints(self.folder)

    def read_link(self, which: str) -> Path | None:
        """The checkpoint that `best` or `last` points to, if it exists."""
        return checkpoints.read_link(self.folder / which)

    def set_link(self, which: str, name: str) -> None:
        """Point `best` or `last` to a checkpoint."""
        files.set_link(self.folder / which, name)

    def repair_links(self, latest: Path) -> None:
        """Point `last` and `best` to where the latest checkpoint says, and delete leftovers.

        A crash between a save and its links leaves them one checkpoint behind.
        """
        for leftover in self.folder.glob(".*.partial"):
            files.remove(leftover)
        best_step = int(read_state(latest)["progress"]["best_step"] or 0)
        best = self.renamed_best(latest) or self.path_of(best_step)
        for which, path in (("last", latest), ("best", best)):
            target = self.read_link(which)
            # By step: the best checkpoint may have been renamed by `discard_after`.
            if (target is None or step_from_path(target) != step_from_path(path)) and path.is_dir():
                self.set_link(which, path.name)

    def renamed_best(self, latest: Path) -> Path | None:
        """The best of the checkpoints that `discard_after` renamed.

        None if none of them has a lower loss than the best one that `latest` knows. The next save
        deletes the others.
        """
        best, loss = None, read_state(latest)["progress"]["best_loss"]
        for path in filter(checkpoints.is_folder, self.folder.glob("step-*.*-*")):
            if not checkpoints.LINK_TARGET.fullmatch(path.name):
                continue
            try:
                progress = read_state(path)["progress"]
            except (UserError, OSError):
                continue
            is_best = progress["best_step"] == step_from_path(path)
            best_loss = progress["best_loss"]
            is_better = best_loss is not None and (loss is None or best_loss < loss)
            if is_best and is_better and not find_corruption(path, checkpoints.INFERENCE_FILES):
                best, loss = path, best_loss
        return best

    def discard_after(self, step: int, why: Literal["diverged", "decayed"] = "diverged") -> None:
        """Rename checkpoints after `step` to `step-N.<why>-k`, so that no resume finds them.

        `best` follows its checkpoint; `prune` deletes the others.
        """
        best = self.read_link("best")
        for path in self.checkpoints():
            if step_from_path(path) > step:
                backup = files.move_to_backup(path, why)
                if path == best:
                    self.set_link("best", backup.name)
        if self.path_of(step).is_dir():
            self.set_link("last", self.path_of(step).name)

    def prune(self, keep: int, protected_steps: Collection[int | None] = ()) -> None:
        """Delete all but best, last, `protected_steps` and the `keep` latest others."""
        protected = {self.read_link("best"), self.read_link("last")}
        protected |= {self.path_of(step) for step in protected_steps if step is not None}
        others = [path for path in self.checkpoints() if path not in protected]
        patterns = (".step-*.partial", "step-*.diverged-*", "step-*.decayed-*")
        leftovers = {path for pattern in patterns for path in self.folder.glob(pattern)} - protected
        for path in [*others[: max(0, len(others) - keep)], *leftovers]:
            # Renamed first, so that an interrupted deletion leaves no partial checkpoint.
            hidden = path.with_name(f".{path.name.strip('.').removesuffix('.partial')}.partial")
            with suppress(FileNotFoundError):  # another process deletes it
                if hidden != path:
                    path.rename(hidden)
                files.remove(hidden)

    def _move_into_place(self, partial: Path, name: str) -> None:
        """Rename a complete folder, replacing a checkpoint of the same step.

        Until then the old one keeps a hidden name, under which `_finish_replacing` finds it.
        """
        target, hidden = self.folder / name, self.folder / f".{name}{REPLACED}"
        if checkpoints.is_folder(target):
            files.remove(hidden)
            target.rename(hidden)
        elif os.path.lexists(target):
            files.move_to_backup(target, "old")
        partial.replace(target)
        files.fsync_dir(self.folder)
        files.remove(hidden)

    def _finish_replacing(self) -> None:
        for hidden in self.folder.glob(f".step-*{REPLACED}"):
            target = self.folder / hidden.name.removeprefix(".").removesuffix(REPLACED)
            if target.exists():
                files.remove(hidden)
            else:
                hidden.rename(target)

    def _kept(self, fix: str) -> str:
        # Checkpoints under their own name are complete, as they are renamed in one step.
        if saved := self.checkpoints():
            return f"{saved[-1].name} is kept: {fix}, and {self._resume_command} resumes from it"
        return f"nothing has been saved yet: {fix}, or give another --out_dir"
