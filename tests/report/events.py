"""Events as in metrics.jsonl."""


def train_event(step: int, loss: float = 2.0) -> dict[str, float]:
    return {
        "step": step,
        "loss": loss,
        "dt_ms": 5.0,
        "tok_per_sec": 1e4,
        "norm": 1.0,
        "lr": 1e-3,
        "epoch": 0.1 * step,
    }


def eval_events(*losses: tuple[int, float]) -> list[dict[str, float]]:
    """Events from pairs of a step and its loss."""
    return [
        {"step": step, "val_loss": loss, "val_bpb": loss / 2, "epoch": step / 100}
        for step, loss in losses
    ]
