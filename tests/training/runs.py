"""Train a tiny model in this process, and read its run folder."""

import json
from pathlib import Path

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.training.signals import StopSignal
from gptforge.training.trainer import Trainer


def build(config: Config) -> Trainer:
    trainer = build_trainer(config, explicit=())
    assert isinstance(trainer, Trainer)
    return trainer


def events(config: Config, kind: str) -> list[dict]:
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def last(config: Config) -> Path:
    path = CheckpointStore(Path(config.out_dir) / "checkpoints").read_link("last")
    assert path is not None
    return path


class StopAfter(StopSignal):
    """Interrupts training after so many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(0)
        self.steps = steps

    def stop_reason(self):
        self.steps -= 1
        return "interrupted" if self.steps == 0 else None
