import pytest

from gptforge.report.metrics import History
from gptforge.report.verdict import verdict
from tests.report.events import eval_events, final_event, train_event


def summarize(evals, *, train=None, max_steps=150, has_val=True) -> str:
    history = History(train=train or [train_event(max_steps - 1, 0.05)], evals=evals)
    return verdict(history, max_steps=max_steps, out_dir="runs/x", has_val=has_val)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (((50, 5.0), (100, 4.0), (150, 3.0)), "still improving"),
        (((50, 5.0), (100, 4.0), (150, 3.999)), "almost stopped"),
        (((50, 5.0), (100, 4.0), (150, 7.0)), "it may be temporary"),
        (((50, 5.0), (100, 4.0), (150, 4.01), (200, 4.0)), "stayed level"),
        (((50, 5.0), (120, 4.0), (150, 4.01)), "In the 30 steps after that it stayed level"),
        (((50, 5.0), (100, 4.0), (150, 4.01)), "stayed level"),
        (((50, 5.0),), "evaluated only once"),
        # Each difference is small at the end of a cosine schedule; their sum is not.
        ([(i, 3 - i / 200 + (i / 200) ** 2 / 4) for i in range(50, 400, 50)], "still improving"),
        # Ten steps after an evaluation that was stopped early, nothing improves much.
        (((250, 5.0), (260, 4.99)), "too late to tell"),
        (((250, 5.0), (260, 4.0)), "too late to tell"),
        (((500, 4.0), (800, 3.0), (1000, 2.9)), "still improving"),
        (((100, 4.0), (900, 2.0), (1000, 1.999)), "evaluated too rarely"),
        (((100, 2.0), (900, 2.0), (1000, 1.999)), "almost stopped"),
        (((250, 4.0), (255, 4.001), (260, 4.002)), "is unknown"),
        # Steps count, not the number of evaluations.
        (((10, 5.0), (20, 3.0), (28, 2.01), (29, 2.005), (30, 2.0)), "still improving"),
    ],
)
def test_verdict_describes_the_curve(losses, words) -> None:
    text = summarize(eval_events(*losses), max_steps=losses[-1][0])
    assert words in text
    assert f"{min(loss for _, loss in losses):.4f}" in text
    assert "python gpt.py sample runs/x" in text


@pytest.mark.parametrize(
    ("train_losses", "epochs", "words"),
    [
        ((5.0, 3.9, 0.5), 14, "began to overfit"),
        # Within the first epoch nothing can be memorized.
        ((5.0, 3.9, 3.5), 0.4, "it may be temporary"),
        ((5.0, 3.9, 6.5), 14, "a smaller --max_lr may help"),
        ((5.0, 3.9, 7.5), 0.4, "a smaller --max_lr may help"),
        # The training loss did not improve either, after many epochs.
        ((5.0, 3.9, 3.9), 14, "it may be temporary"),
    ],
)
def test_overfitting_needs_a_falling_training_loss(train_losses, epochs, words) -> None:
    evals = eval_events((50, 5.0), (100, 4.0), (150, 7.0))
    evals[-1]["epoch"] = epochs
    train = [
        train_event(50 * i + j, loss) for i, loss in enumerate(train_losses) for j in range(30, 50)
    ]
    text = summarize(evals, train=train)
    assert "After that it got worse, from 4.0000 to 7.0000 nats per token" in text and words in text
    assert "The best checkpoint was kept" in text


def test_without_val_split_and_without_evaluation() -> None:
    assert "No text was held out" in summarize([], max_steps=10, has_val=False)
    stopped_early = summarize([], max_steps=10)
    assert "was not evaluated" in stopped_early
    assert "held out" not in stopped_early


def test_a_diverged_run_has_no_sample_command() -> None:
    train = [train_event(9) | {"loss": None}]
    evals = [eval_events((10, 1.0))[0] | {"val_loss": None}]
    text = summarize(evals, train=train, max_steps=10)
    assert text == "The held-out loss was always NaN or Inf: training diverged."


@pytest.mark.parametrize(("val_tokens", "is_subset"), [(400, True), (1000, False), (None, False)])
def test_the_loss_on_all_held_out_text_comes_first(val_tokens, is_subset) -> None:
    evals = [event | {"val_tokens": val_tokens} for event in eval_events((50, 5.0), (100, 4.0))]
    if val_tokens is None:  # as of an older version
        evals = eval_events((50, 5.0), (100, 4.0))
    history = History(evals=evals, final=final_event(100, loss=3.5, tokens=1000))
    text = verdict(history, max_steps=100, out_dir="runs/x", has_val=True)
    first, second, _ = text.splitlines()
    assert first == (
        "Best held-out loss 3.5000 nats per token, perplexity 33.12, 1.7500 bits per byte, 3.5000 "
        "nats per character, over 1,000 tokens, all that is held out: step 100 of 100, epoch 1.0."
    )
    subset = "The evaluations during training read 400 of these tokens. "
    assert second.startswith(subset) == is_subset
    assert "still improving" in second


def test_a_run_that_was_evaluated_only_at_its_end() -> None:
    history = History(train=[train_event(0)], final=final_event(1, loss=3.5, tokens=1000))
    text = verdict(history, max_steps=1, out_dir="runs/x", has_val=True)
    assert text.startswith("Best held-out loss 3.5000 nats per token")
    assert "step 1 of 1.\nTry it" in text


@pytest.mark.parametrize("losses", [((16, 4.0),), ((16, 4.0), (40, 3.0))])
def test_no_trend_after_a_best_checkpoint_of_dropped_steps(losses) -> None:
    """A longer wsd run resumes from before the decay, and may not have reached that loss again."""
    history = History(evals=eval_events(*losses), final=final_event(20, loss=2.5, tokens=1000))
    text = verdict(history, max_steps=40, out_dir="runs/x", has_val=True)
    assert "step 20 of 40" in text and "Its steps were then dropped" in text
    assert "improving" not in text and "level" not in text


def test_a_small_part_of_an_epoch_is_not_rounded_to_zero() -> None:
    evals = eval_events((1, 3.0), (3, 2.0))
    assert "at step 3 of 150, epoch 0.03." in summarize(evals)
    train = [train_event(149) | {"epoch": 0.042}]
    assert "after 0.042 epochs" in summarize([], train=train, has_val=False)


@pytest.mark.parametrize(("loss", "words"), [(0.0, "0.0000 nats"), (None, "nan nats")])
def test_a_training_loss_of_zero_is_a_number(loss, words) -> None:
    """A text of one character is predicted with a loss of exactly 0, which was shown as nan."""
    assert f"Training loss {words}" in summarize([], train=[train_event(9, loss)], has_val=False)
