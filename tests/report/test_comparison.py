"""Which runs are compared by what, and when a difference is called real."""

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path

import pytest

from gptforge.optim.schedule import learning_rate
from gptforge.report.comparison import compare, student_t_p_value
from gptforge.report.run_info import read_run
from tests.report.events import final_event
from tests.report.run_folders import write_run


def compare_runs(*folders: Path):
    return compare([read_run(folder) for folder in folders])


def write_seeds(folder: Path, losses: list[float], **fields: object) -> list[Path]:
    return [
        write_run(folder / f"{[*fields.values()]}-{seed}", {10: 4.0, 20: loss}, seed=seed, **fields)
        for seed, loss in enumerate(losses)
    ]


# Two-sided 5% and 1% points of the tables of Student's t.
@pytest.mark.parametrize(
    ("t", "df", "p"),
    [
        (12.706, 1, 0.05),
        (63.657, 1, 0.01),
        (4.303, 2, 0.05),
        (3.182, 3, 0.05),
        (4.604, 4, 0.01),
        (2.571, 5, 0.05),
        (2.228, 10, 0.05),
        (2.947, 15, 0.01),
        (1.980, 120, 0.05),
    ],
)
def test_p_values_are_those_of_the_tables(t, df, p) -> None:
    assert student_t_p_value(t, df) == pytest.approx(p, rel=2e-3)
    assert student_t_p_value(-t, df) == student_t_p_value(t, df)


def test_p_values_at_the_ends() -> None:
    for df in (1, 2, 7, 8):
        assert student_t_p_value(0, df) == 1
        assert student_t_p_value(math.inf, df) == pytest.approx(0, abs=1e-12)


def test_runs_that_differ_by_the_seed_alone_are_grouped(tmp_path) -> None:
    small = write_seeds(tmp_path, [2.00, 2.02, 2.04], dropout=0.0)
    large = write_seeds(tmp_path, [1.50, 1.52], dropout=0.2)
    found = compare_runs(*small, *large)
    assert found.fields.keys() == {"dropout", "seed"}
    best, worst = found.groups
    assert [run.path for run in best.runs] == large
    assert best.scores == [1.50, 1.52] and best.mean == pytest.approx(1.51)
    assert best.spread == pytest.approx(statistics.stdev([1.50, 1.52]))
    (difference,) = found.differences
    assert difference.difference == pytest.approx(0.51) and difference.is_real
    # Pooled: (2 * 0.0004 + 1 * 0.0002) / 3.
    error = math.sqrt(0.001 / 3 * (1 / 2 + 1 / 3))
    assert difference.p_value == pytest.approx(student_t_p_value(0.51 / error, 3))
    assert "real" in found.verdict[-1] and worst.name in found.verdict[-1]


def write_scheduled(folder: Path, *, extended_from: int = 0, **fields: object) -> Path:
    """A run of 20 steps with the learning rates of its schedule, perhaps extended after 10."""
    run = write_run(folder, {10: 4.0, 20: 2.0}, **{"max_steps": 20, "warmup_steps": 2} | fields)
    config, lines = read_run(run).config, []
    shorter = dataclasses.replace(config, max_steps=extended_from or config.max_steps)
    for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if event["event"] == "start":
            event["max_steps"] = shorter.max_steps
        if event["event"] == "train":
            event["lr"] = learning_rate(shorter if event["step"] < 10 else config, event["step"])
            if event["step"] == 10 and extended_from:
                lines.append({"event": "resume", "step": 10, "max_steps": config.max_steps})
        lines.append(event)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


def groups_of(*folders: Path) -> list[list[str]]:
    groups = [[run.path.name for run in group.runs] for group in compare_runs(*folders).groups]
    return sorted(groups)


@pytest.mark.parametrize("fields", [{}, {"schedule": "linear"}])
def test_an_extended_run_is_no_seed_of_a_straight_one(tmp_path, fields) -> None:
    straight = [write_scheduled(tmp_path / f"s{seed}", seed=seed, **fields) for seed in (1, 2)]
    extended = [
        write_scheduled(tmp_path / f"e{seed}", seed=seed, extended_from=10, **fields)
        for seed in (1, 3)
    ]
    other = write_scheduled(tmp_path / "o", seed=4, extended_from=12, **fields)
    runs = (straight[0], extended[0], other, extended[1], straight[1])
    assert groups_of(*runs) == [["e1", "e3"], ["o"], ["s1", "s2"]]
    notes = compare_runs(*runs).notes
    assert len(notes) == 2 and notes[0] == (
        f"{extended[0].as_posix()} differs from {straight[0].as_posix()} in its schedule: the "
        "--max_steps of one was raised while it trained"
    )


def test_an_extended_run_without_a_trace_is_a_seed_of_a_straight_one(tmp_path) -> None:
    straight = write_scheduled(tmp_path / "s", seed=1, schedule="constant")
    extended = write_scheduled(tmp_path / "e", seed=2, schedule="constant", extended_from=10)
    assert groups_of(straight, extended) == [["s", "e"]]
    ramp = {"schedule": "constant", "dropout": 0.1, "dropout_ramp": 0.5}
    straight = write_scheduled(tmp_path / "sr", seed=1, **ramp)
    extended = write_scheduled(tmp_path / "er", seed=2, **ramp, extended_from=10)
    assert groups_of(straight, extended) == [["er"], ["sr"]]


def test_a_run_without_checkpoints_has_the_tokenizer_of_its_configuration(tmp_path) -> None:
    fields = {"tokenizer": "char", "eval_tokens": 0}
    saved = write_run(tmp_path / "a", {10: 2.0}, text="To be", **fields)
    found = compare_runs(saved, write_run(tmp_path / "b", {10: 2.1}, seed=1, **fields))
    assert (found.metric, found.notes) == ("val_loss", [])


def test_a_difference_within_the_spread_of_seeds_is_not_real(tmp_path) -> None:
    runs = write_seeds(tmp_path, [1.50, 1.56], dropout=0.0)
    runs += write_seeds(tmp_path, [1.51, 1.57], dropout=0.1)
    found = compare_runs(*runs)
    assert not found.differences[0].is_real
    assert "no difference is shown" in found.verdict[-1]


def test_chance_is_rarely_called_real(tmp_path) -> None:
    rng = random.Random(0)
    wrong = 0
    for trial in range(40):
        runs = []
        for dropout in (0.0, 0.1, 0.2):
            losses = [rng.gauss(1.5, 0.01) for _ in range(2)]
            runs += write_seeds(tmp_path / str(trial), losses, dropout=dropout)
        wrong += any(difference.is_real for difference in compare_runs(*runs).differences)
    assert wrong <= 5


def test_one_seed_each_gives_no_verdict_on_the_difference(tmp_path) -> None:
    runs = [*write_seeds(tmp_path, [1.5], dropout=0.0), *write_seeds(tmp_path, [1.6], dropout=0.1)]
    found = compare_runs(*runs)
    assert found.differences[0].is_real is None
    assert "With one seed each, the spread over seeds is unknown" in found.verdict[-1]


def test_a_run_counts_once_and_only_if_it_is_complete(tmp_path) -> None:
    a = write_run(tmp_path / "a", {10: 1.5})
    again = write_run(tmp_path / "again", {10: 1.5})
    stopped = write_run(tmp_path / "stopped", {5: 1.4}, reason="interrupted", seed=2)
    crashed = write_run(tmp_path / "crashed", {5: 1.4}, reason=None, seed=3)
    found = compare_runs(a, again, stopped, crashed)
    assert found.groups[0].scores == [1.5]
    notes = "\n".join(found.notes)
    assert "again repeats a configuration and seed" in notes
    assert "stopped is stopped at step 5 of 500" in notes
    assert "crashed is unfinished at step 5 of 500" in notes
    assert "nothing to choose between" in found.verdict[-1]
    # A limit of time is a budget that runs may be compared by.
    limited = write_run(tmp_path / "limited", {5: 1.6}, reason="time_limit", time_limit=3.0)
    assert len(compare_runs(a, limited).differences) == 1


def test_different_texts_are_not_compared(tmp_path) -> None:
    a = write_run(tmp_path / "a", {10: 1.5}, text="To be")
    same = write_run(tmp_path / "same", {10: 1.6}, text="To be", input="copy.txt", dropout=0.1)
    other = write_run(tmp_path / "other", {10: 1.4}, text="or not", dropout=0.1)
    assert compare_runs(a, same).metric == "val_loss"
    found = compare_runs(a, other)
    assert found.metric is None and not found.differences
    assert found.notes == ["they were trained or evaluated on different texts (play.txt)"]
    assert found.verdict == ["No verdict: the losses of these runs cannot be compared."]


@pytest.mark.parametrize(("other_val", "metric"), [("b", "val_bpb"), ("c", None)])
def test_the_same_files_are_the_same_text_if_the_held_out_ones_are(
    tmp_path, other_val, metric
) -> None:
    paths = []
    for tokenizer, val in (("char", "b"), ("byte", other_val)):
        paths.append(write_run(tmp_path / tokenizer, {10: 1.5}, text=val, tokenizer=tokenizer))
        [state] = paths[-1].glob("checkpoints/*/state.json")
        # The hash of several files depends on the tokenizer.
        record = {"text_sha256": tokenizer, "inputs": ["a"], "val_inputs": [val]}
        state.write_text(json.dumps(json.loads(state.read_text()) | record))
    assert compare_runs(*paths).metric == metric


@pytest.mark.parametrize("field", [{"val_fraction": 0.2}, {"eval_tokens": 512}])
def test_different_parts_of_a_text_are_not_compared(tmp_path, field) -> None:
    found = compare_runs(
        write_run(tmp_path / "a", {10: 1.5}), write_run(tmp_path / "b", {10: 1.5}, **field)
    )
    assert found.metric is None
    assert f"({next(iter(field))} differ)" in found.notes[0]


def test_different_tokenizers_are_compared_by_bits_per_byte(tmp_path) -> None:
    fields = {"text": "To be", "tokenizer": "byte"}
    a = write_run(tmp_path / "a", {10: 3.0}, text="To be", tokenizer="char")
    b = write_run(tmp_path / "b", {10: 2.0}, **fields)
    found = compare_runs(a, b)
    assert found.metric == "val_bpb"
    assert found.groups[0].scores == [1.0]
    assert "bits per byte are" in found.notes[0] and "bits per byte" in found.verdict[-1]
    # With a part of the text, each tokenizer would be evaluated on another part.
    a = write_run(tmp_path / "c", {10: 3.0}, text="To be", tokenizer="char", eval_tokens=64)
    b = write_run(tmp_path / "d", {10: 2.0}, eval_tokens=64, **fields)
    assert compare_runs(a, b).metric is None


def test_losses_on_all_held_out_text_compare_where_all_runs_have_them(tmp_path) -> None:
    paths = []
    for name, loss, fields in (("a", 1.5, {}), ("b", 1.6, {"eval_tokens": 64}), ("c", 1.7, {})):
        paths.append(write_run(tmp_path / name, {10: loss}, dropout=loss / 10, **fields))
    for path, loss in zip(paths[:2], (1.8, 1.7), strict=True):
        metrics = path / "metrics.jsonl"
        *lines, end = metrics.read_text().splitlines()
        end = json.dumps(json.loads(end) | final_event(10, loss=loss, tokens=999))
        metrics.write_text("\n".join([*lines, end]) + "\n")
    found = compare_runs(*paths[:2])
    assert found.metric == "val_loss" and [g.scores for g in found.groups] == [[1.7], [1.8]]
    # One of these has only evaluations during training.
    found = compare_runs(paths[0], paths[2])
    assert [group.scores for group in found.groups] == [[1.5], [1.7]]
    assert compare_runs(*paths).metric is None


def test_losses_on_a_part_of_the_held_out_text_are_named_as_such(tmp_path) -> None:
    fields = {"eval_tokens": 64, "val_tokens": 64}
    a, b = (write_run(tmp_path / name, {10: 3.0}, seed=ord(name), **fields) for name in "ab")
    [*lines, end] = (a / "metrics.jsonl").read_text().splitlines()
    end = json.dumps(json.loads(end) | final_event(10, loss=2.9, tokens=999))
    (a / "metrics.jsonl").write_text("\n".join([*lines, end]) + "\n")
    [note] = compare_runs(a, b).notes
    assert note.startswith(f"without a loss on all held-out text: {b.as_posix()}; so the losses")
    assert "without a loss" not in " ".join(compare_runs(a, a).notes)


def test_runs_without_held_out_loss(tmp_path) -> None:
    runs = [write_run(tmp_path / name, {}, dropout=d) for name, d in (("a", 0.0), ("b", 0.1))]
    found = compare_runs(*runs)
    assert len(found.notes) == 2 and "has no held-out loss" in found.notes[0]
    assert found.verdict == ["No verdict: too few complete runs."]


def test_the_same_global_batch_is_the_same_configuration(tmp_path) -> None:
    a = write_run(tmp_path / "a", {10: 1.5}, batch_size=8, gradient_accumulation_steps=2, seed=1)
    b = write_run(tmp_path / "b", {10: 1.5}, batch_size=4, gradient_accumulation_steps=4, seed=2)
    c = write_run(tmp_path / "c", {10: 1.5}, batch_size=4, gradient_accumulation_steps=2, seed=3)
    assert [len(group.runs) for group in compare_runs(a, b, c).groups] == [2, 1]
