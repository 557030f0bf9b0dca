"""The folder of a sweep: the text that trials see, what was tried, and one run folder each.

The held-out text of the configuration is the test tail. Trials read only the rest, as token
shards, and hold out a second split at its end by the same fraction.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files, tokenizers
from gptforge.config import FIELDS, Config, merge, resume_conflicts
from gptforge.data.dataset import Dataset
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.errors import UserError, parsing
from gptforge.sweep.space import Values, format_value
from gptforge.tokenizers.base import smallest_dtype

RECORD, DATA = "sweep.json", "data"
"""What was tried, and the folder of the text, which is locked while a sweep runs."""
TRAIN_TOKENS, TOKENIZER = f"{DATA}/train.bin", f"{DATA}/tokenizer.json"
COPY_TOKENS = 2**24
"""Tokens copied at a time."""
INPUT_FIELDS = frozenset(
    {"input", "encoding", "field", "kind", "split_by_name", "raw_bin", "tokenizer", "val_fraction"}
)
"""Fields that say what the text is: trials read the sweep's copy instead."""

FLAGS_OF_SWEEP = frozenset({"restart", "device"})
"""Flags that a sweep does not pass on as they are."""


class SweepDir:
    """An open sweep folder.

    Args:
        path: the folder.
        config: the resolved configuration that all trials start from.
        dataset: its text, with the test tail as validation split.
        swept: fields that differ between trials.

    Raises:
        UserError: if the folder holds something else, or a sweep of another configuration.
    """

    def __init__(
        self, path: Path, config: Config, dataset: Dataset, swept: Collection[str]
    ) -> None:
        self.path = path
        (path / DATA).mkdir(parents=True, exist_ok=True)
        self._record: dict[str, Any] = {
            "text": dataset.sha256,
            "config": vars(config),
            "trials": [],
        }
        if (path / RECORD).exists():
            with parsing(path / RECORD, "the record of a sweep"):
                self._record = json.loads(files.read_text(path / RECORD))
                old = {n: v for n, v in self._record["config"].items() if n in FIELDS}
                old_config = merge(Config(), old, source=RECORD)
            fixed = {name: getattr(config, name) for name in swept}
            old_config = dataclasses.replace(old_config, **fixed)
            conflicts = resume_conflicts(old_config, config)
            if config.max_steps > old_config.max_steps:
                conflicts.append(f"max_steps: {old_config.max_steps} -> {config.max_steps}")
            if self._record["text"] != dataset.sha256:
                conflicts.append("the text is another one")
            if conflicts:
                raise UserError(
                    f"{path.as_posix()} holds a sweep of another configuration "
                    f"({'; '.join(conflicts)}): use another --out_dir, or start over with --restart"
                )
        elif any(entry.name != DATA for entry in path.iterdir()):
            raise UserError(
                f"{path.as_posix()} is not empty and holds no sweep: use another --out_dir"
            )
        if not (path / RECORD).exists():
            # The record follows with the first trial, so a mistake found before leaves none.
            tokenizers.save(dataset.tokenizer, path / TOKENIZER)
            _write_tokens(path / TRAIN_TOKENS, dataset)

    def number(self, values: Values) -> int:
        """The number of the trial with these values, from 1; a new one is recorded."""
        trials = self._record["trials"]
        if values not in trials:
            trials.append(values)
            self._save()
        return int(trials.index(values)) + 1

    @property
    def input_flags(self) -> dict[str, str]:
        """Flags with which a trial reads the training part of the text."""
        return {
            "input": (self.path / TRAIN_TOKENS).as_posix(),
            "tokenizer": (self.path / TOKENIZER).as_posix(),
            "raw_bin": "false",
        }

    def _save(self) -> None:
        text = json.dumps(self._record, indent=1, ensure_ascii=True)
        files.atomic_write(self.path / RECORD, text + "\n")


def train_args(
    config: Config, explicit: Collection[str], *overrides: Mapping[str, str]
) -> list[str]:
    """Arguments of `gptforge train` that give a configuration.

    Args:
        config: as parsed from flags, preset and file.
        explicit: fields that the user set.
        overrides: further flags; later ones win.
    """
    flags = {"preset": config.preset}
    if config.config:
        flags["config"] = config.config
    flags |= {name: format_value(getattr(config, name)) for name in FIELDS if name in explicit}
    for more in overrides:
        flags |= more
    return [f"--{name}={value}" for name, value in flags.items() if name not in FLAGS_OF_SWEEP]


def _write_tokens(path: Path, dataset: Dataset) -> None:
    dtype: Any = np.dtype(smallest_dtype(dataset.tokenizer.vocab_size))
    writer = ShardWriter(path, dtype)
    try:
        for start in range(0, len(dataset.train), COPY_TOKENS):
            writer.write(dataset.train[start : start + COPY_TOKENS])
        writer.close()
    except BaseException:
        writer.abort()
        raise
