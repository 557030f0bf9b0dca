import dataclasses
import json
import math

import pytest

from gptforge.config import Config
from gptforge.report.format import ValLoss
from gptforge.training.state import TrainState

NOTHING_EVALUATED = ValLoss(0.0, 0, 0, 0, sequences_done=0)


def test_state_of_version_0_1_with_an_interrupted_final_evaluation() -> None:
    counters = {"step": 9, "loss": 1.0, "best_loss": None, "best_step": 0, "loss_sum": 6.0}
    counters |= {"loss_count": 3.0, "returns": 2, "unjudged": 1, "seconds": 5.0}
    state = TrainState.from_json({"progress": counters})
    assert state.partial_eval == NOTHING_EVALUATED
    assert state.recent_losses == [2.0, 2.0, 2.0]
    assert (state.rollbacks, state.best_loss) == (2, math.inf)


def test_json_round_trip() -> None:
    state = TrainState(
        step=7,
        loss=math.nan,
        recent_losses=[1.5, math.inf],
        rollbacks=1,
        diverged_at=5,
        bad_steps=2,
        partial_eval=ValLoss(
            sequences_done=3,
            num_sequences=9,
            total_nats=1.25,
            num_tokens=48,
            num_bytes=50,
            num_chars=49,
        ),
    )
    record = json.loads(json.dumps(state.to_json()))
    # The keys of earlier versions.
    assert record["partial"] == {
        "windows": 3, "num_windows": 9, "nats": 1.25, "tokens": 48, "bytes": 50, "chars": 49
    }  # fmt: skip
    assert record["progress"]["returns"] == 1
    assert record["pending"] == ["evaluate"]
    assert TrainState().to_json()["pending"] == []
    read = TrainState.from_json(record)
    assert math.isnan(read.loss) and math.isnan(read.recent_losses[1])
    same = {"loss": 0.0, "recent_losses": []}
    assert dataclasses.replace(read, **same) == dataclasses.replace(state, **same)
    del record["partial"]["chars"]
    # Version 0.1 counted no characters.
    assert TrainState.from_json(record).partial_eval == NOTHING_EVALUATED


@pytest.mark.parametrize(
    ("keep", "every", "early"),
    [(0, 250, []), (1, 250, [25]), (2, 250, [2, 25]), (9**9, 1000, [1, 10, 100]), (1, 6, [])],
)
def test_early_checkpoints_are_log_spaced(keep, every, early) -> None:
    assert sorted(Config(keep_checkpoints=keep, save_every=every).early_steps) == early
