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


def final_event(step: int, *, loss: float, tokens: int) -> dict[str, float]:
    """The loss of the best checkpoint, of `step`, on all held-out text, as in the end event."""
    return {
        "best_step": step,
        "final_val_loss": loss,
        "final_val_bpb": loss / 2,
        "final_val_nats_per_char": loss,
        "final_val_tokens": tokens,
    }
