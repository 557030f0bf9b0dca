"""Run folders without training."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from gptforge.config import Config
from gptforge.config_file import to_toml
from tests.report.events import eval_events, train_event

MADE_BY = {"gptforge": "0.2.0", "torch": "2.13.0", "command": "python gpt.py --preset debug"}


def write_run(
    folder: Path,
    losses: Mapping[int, float],
    *,
    reason: str | None = "finished",
    text: str = "",
    val_tokens: int = 0,
    **fields: object,
) -> Path:
    """Write a run with these held-out losses by step.

    Args:
        folder: the run folder.
        losses: held-out loss by step; bits per byte are half of it.
        reason: of the end event; None for none.
        text: what the hash of its text follows from; empty for a run without checkpoints.
        val_tokens: of each evaluation; 0: not written, as in early versions.
        fields: of its configuration.
    """
    config = dataclasses.replace(
        Config(input="play.txt", vocab_size=64, n_layer=1, n_head=1, n_embd=8), **fields
    )
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(config, MADE_BY), "utf-8")
    last = max(losses, default=1)
    start = {"event": "start", "device": "cpu", "dtype": "float32", "command": "c", "time": 1e9}
    events = [start, *({"event": "train", **train_event(step)} for step in range(last))]
    size = {"val_tokens": val_tokens} if val_tokens else {}
    events += [{"event": "eval", **event, **size} for event in eval_events(*losses.items())]
    if reason:
        events.append({"event": "end", "reason": reason, "step": last, "seconds": 90.0})
    lines = [json.dumps(event) + "\n" for event in events]
    (folder / "metrics.jsonl").write_text("".join(lines), "utf-8")
    if text:
        write_checkpoint(folder / "checkpoints" / f"step-{last:06d}", config.tokenizer, text)
    return folder


def write_checkpoint(folder: Path, tokenizer: str, text: str) -> None:
    """Write the state and tokenizer of a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps({"type": tokenizer}), "utf-8")
    state = {
        "version": 1,
        "progress": {"step": 1, "best_step": 1, "seconds": 60.0},
        "loader": {"position": 0},
        "scaler": {},
        "file_sizes": {},
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
