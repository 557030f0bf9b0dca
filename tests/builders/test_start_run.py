"""Starting, resuming and restarting runs, and what happens to their folders."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from gptforge.builders import build_train_step
from gptforge.builders.build_train_step import estimate_duration
from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_config, read_tensors, read_tokenizer
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.tokenizers import save
from gptforge.tokenizers.char import CharTokenizer
from tests.training.runs import StopAfter, build, events, last


def test_finished_run_is_left_alone_and_continues_with_more_steps(config, messages) -> None:
    build(config).fit()
    assert build_trainer(config, explicit=()) == "finished"
    assert "is finished" in messages[-1]
    longer = dataclasses.replace(config, max_steps=30)
    trainer = build_trainer(longer, explicit=())
    assert any("follows the new schedule" in line for line in messages)
    trainer.fit()
    assert [event["step"] for event in events(config, "train")] == list(range(30))


def test_a_finished_run_with_half_an_end_event_writes_it_again(config) -> None:
    build(config).fit()
    metrics = Path(config.out_dir) / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[:-20])
    assert build(config).fit() == "finished"
    assert [e["step"] for e in events(config, "train")] == list(range(20))
    assert [e["reason"] for e in events(config, "end")] == ["finished"]
    assert build_trainer(config, explicit=()) == "finished"


def test_first_command_still_works_after_max_steps_was_raised(config, messages) -> None:
    build(config).fit()
    longer = build(dataclasses.replace(config, max_steps=30))
    longer.stop_signal = StopAfter(3)
    assert longer.fit() == "interrupted"
    note = "--max_steps 20 is less than the 30 that this run has by now: it keeps 30"
    del messages[:]
    trainer = build(config)
    assert sum(note in line for line in messages) == 1
    assert trainer.fit() == "finished"
    assert events(config, "train")[-1]["step"] == 29
    assert build_trainer(config, explicit=["max_steps"]) == "finished"
    assert "is finished: 30 steps are done" in messages[-1]
    with pytest.raises(UserError, match=r"another configuration \(seed: \d+ -> 3\)"):
        build(dataclasses.replace(config, seed=3))


def test_other_configuration_is_refused_by_field(config) -> None:
    build(config).fit()
    for change in ({"n_layer": 3}, {"max_lr": 0.5}, {"batch_size": 5}, {"seed": 3}):
        with pytest.raises(UserError, match=next(iter(change))):
            build(dataclasses.replace(config, **change))


def test_other_text_is_refused(config, play) -> None:
    build(config).fit()
    play.write_text(play.read_text().replace("light", "night"))
    with pytest.raises(UserError, match="input: not the text that"):
        build(dataclasses.replace(config, max_steps=30))


def test_resume_without_the_tokenizer_file_uses_the_runs_copy(config, tmp_path, messages) -> None:
    path = tmp_path / "tokenizer.json"
    save(CharTokenizer.from_text(Path(config.input).read_text()), path)
    config = dataclasses.replace(config, tokenizer=str(path))
    trainer = build(config)
    trainer.stop_signal = StopAfter(7)
    trainer.fit()
    path.unlink()
    trainer = build_trainer(config, explicit=["tokenizer"])
    assert trainer.fit() == "finished"
    assert f"note: {path} does not exist any more: using the run's copy" in "\n".join(messages)
    # The configuration still names that file.
    assert read_config(last(config)).tokenizer == str(path)
    for other in ({"tokenizer": str(tmp_path / "other.json")}, {"out_dir": str(tmp_path / "b")}):
        with pytest.raises(UserError, match="nor the path of a tokenizer"):
            build(dataclasses.replace(config, **other))


def test_restart_moves_the_old_run(config) -> None:
    build(config).fit()
    build(dataclasses.replace(config, restart=True, n_layer=1)).fit()
    backup = Path(config.out_dir + ".old-1")
    assert (backup / "checkpoints" / "last" / "manifest.json").exists() or (
        backup / "checkpoints" / "last"
    ).is_file()
    assert (Path(config.out_dir) / "log.md").is_file()


@pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")
def test_run_folder_is_locked_under_any_path(config, tmp_path) -> None:
    first = build(config)
    (tmp_path / "link").symlink_to(config.out_dir)
    for same in (config.out_dir, str(tmp_path / "link")):
        with pytest.raises(UserError, match="is being trained by another process"):
            build(dataclasses.replace(config, out_dir=same))
    assert first.fit() == "finished"


def test_restarted_run_is_locked_too(config) -> None:
    build(config).fit()
    restarted = build(dataclasses.replace(config, restart=True))
    with pytest.raises(UserError, match="is being trained by another process"):
        build(config)
    assert restarted.fit() == "finished"
    assert not list(Path(config.out_dir).parent.rglob(".lock"))


def test_folder_with_other_files_is_refused(config) -> None:
    Path(config.out_dir).mkdir()
    (Path(config.out_dir) / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        build(config)
    assert (Path(config.out_dir) / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("flag", ["input", "tokenizer"])
def test_restart_does_not_move_files_that_the_run_needs(config, play, flag) -> None:
    folder = Path(config.out_dir)
    first = build(config)
    first.fit()
    if flag == "input":
        needed = folder / "play.txt"
        shutil.copy(play, needed)
    else:
        needed = folder / "tokenizer.json"
        shutil.copy(last(config) / "tokenizer.json", needed)
    restarted = dataclasses.replace(config, restart=True, **{flag: str(needed)})
    with pytest.raises(UserError, match=rf"would move .*run to a backup with --{flag} .* in it"):
        build(restarted)
    assert needed.is_file()
    assert (folder / "log.md").is_file()


def test_restart_is_not_offered_for_a_folder_of_texts(config, play) -> None:
    texts = Path(config.out_dir)
    texts.mkdir()
    shutil.copy(play, texts)
    with pytest.raises(UserError, match="choose another, as --input") as refused:
        build(dataclasses.replace(config, input=str(texts)))
    assert "--restart" not in str(refused.value)
    # The same folder, named by glob patterns.
    for pattern in (f"{texts}/*.txt", f"{str(texts)[:-1]}?/*.txt", f"{texts.parent}/**/*.txt"):
        with pytest.raises(UserError, match=r"to a backup with --input .*\*\.txt in it"):
            build(dataclasses.replace(config, input=pattern, restart=True))


def test_restart_does_not_move_other_runs(config) -> None:
    inner = dataclasses.replace(config, out_dir=f"{config.out_dir}/deep/inner")
    running = build(inner)
    for folder in (config.out_dir, f"{config.out_dir}/deep"):
        with pytest.raises(UserError, match="holds the run inner"):
            build(dataclasses.replace(config, out_dir=folder, restart=True))
    assert running.fit() == "finished"
    # Nor when it is not being trained: there may be no other copy.
    with pytest.raises(UserError, match="holds the run inner"):
        build(dataclasses.replace(config, restart=True))


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/best", "checkpoints/mine/more"])
def test_run_inside_another_runs_checkpoints_is_refused(config, inside, messages) -> None:
    build(config).fit()
    with pytest.raises(UserError, match="among the checkpoints of a run"):
        build(dataclasses.replace(config, out_dir=f"{config.out_dir}/{inside}"))
    assert build_trainer(config, explicit=()) == "finished"
    assert "is finished" in messages[-1]


def test_run_inside_one_being_trained_is_refused(config) -> None:
    running = build(config)
    with pytest.raises(UserError, match="which another process trains into"):
        build(dataclasses.replace(config, out_dir=f"{config.out_dir}/more"))
    assert running.fit() == "finished"


def test_folder_that_cannot_be_moved_is_refused_early(config, monkeypatch) -> None:
    build(config).fit()
    restarted = dataclasses.replace(config, restart=True)
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == Path(config.out_dir))
        with pytest.raises(UserError, match="something is mounted there"):
            build(restarted)
    parent, access = Path(config.out_dir).parent, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != parent and access(path, mode))
    with pytest.raises(UserError, match="cannot be written to"):
        build(restarted)


def test_finished_run_may_be_read_only(config, monkeypatch, messages) -> None:
    build(config).fit()
    folder, access = Path(config.out_dir), os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not Path(path).is_relative_to(folder) and access(path, mode),
    )
    assert build_trainer(config, explicit=frozenset()) == "finished"
    assert "is finished" in messages[-1]
    longer = dataclasses.replace(config, max_steps=config.max_steps + 1)
    with pytest.raises(UserError, match="cannot be written to"):
        build(longer)


@pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")
def test_dangling_link_is_named(config, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link is a dangling link"):
        build(dataclasses.replace(config, out_dir=str(tmp_path / "link" / "run")))


def test_interrupt_before_the_first_step_leaves_no_folder(config, monkeypatch) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_train_step, "dry_run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert not Path(config.out_dir).exists()
    assert build(config).fit() == "finished"


def test_leftovers_of_a_failed_start_are_removed(config) -> None:
    # A full disk once left a folder that was then refused.
    for name in ("checkpoints", "log.md", ".config.partial.toml"):
        path = Path(config.out_dir) / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "checkpoints" else path.write_text("half")
    assert build(config).fit() == "finished"
    assert "half" not in (Path(config.out_dir) / "log.md").read_text()


def test_run_without_a_checkpoint_starts_from_scratch(config) -> None:
    build(config)
    assert not (Path(config.out_dir) / "checkpoints" / "last").exists()
    trainer = build(dataclasses.replace(config, max_lr=0.02))
    trainer.fit()
    assert len(events(config, "start")) == 1


def test_corrupt_last_checkpoint_falls_back_to_the_one_before(config, messages) -> None:
    build(config).fit()
    (last(config) / "optimizer.safetensors").write_bytes(b"broken")
    trainer = build_trainer(config, explicit=())
    assert any("step-000020 is damaged" in line for line in messages)
    assert trainer.state.step == 18
    assert trainer.fit() == "finished"


def test_outdated_links_are_repaired(config) -> None:
    build(config).fit()
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    expected = store.read_link("best"), store.read_link("last")
    store.set_link("best", "step-000006")
    store.set_link("last", "step-000006")
    assert build_trainer(config, explicit=()) == "finished"
    assert (store.read_link("best"), store.read_link("last")) == expected


def test_run_without_usable_checkpoints_is_not_restarted_silently(config) -> None:
    build(config).fit()
    log = (Path(config.out_dir) / "log.md").read_bytes()
    for path in CheckpointStore(Path(config.out_dir) / "checkpoints").checkpoints():
        (path / "model.safetensors").write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match="--restart"):
            build(config)
    shutil.rmtree(Path(config.out_dir) / "checkpoints")
    with pytest.raises(UserError, match="--restart"):
        build(config)
    assert (Path(config.out_dir) / "log.md").read_bytes() == log


def test_failed_restart_leaves_the_old_run_in_place(config, tmp_path) -> None:
    build(config).fit()
    wrong = dataclasses.replace(config, restart=True, init_from=config.out_dir, n_embd=64)
    with pytest.raises(UserError):
        build_trainer(wrong, explicit={"n_embd"})
    assert (Path(config.out_dir) / "log.md").is_file()
    assert not Path(f"{config.out_dir}.old-1").exists()
    # A run can restart from its old weights: they are read first.
    again = dataclasses.replace(config, restart=True, init_from=config.out_dir)
    assert build(again).fit() == "finished"


def test_resume_does_not_need_the_init_from_run(config, tmp_path) -> None:
    build(config).fit()
    other = dataclasses.replace(config, init_from=config.out_dir, out_dir=str(tmp_path / "two"))
    first = build(other)
    first.stop_signal = StopAfter(8)
    first.fit()
    Path(config.out_dir).rename(tmp_path / "elsewhere")
    assert build(other).fit() == "finished"


def test_end_event_is_written_after_a_crash(config) -> None:
    build(config).fit()
    metrics = Path(config.out_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"end"' not in line))
    assert build(config).fit() == "finished"
    assert len(events(config, "end")) == 1
    assert build_trainer(config, explicit=()) == "finished"


def test_resume_keeps_the_save_events(config) -> None:
    first = build(config)
    first.stop_signal = StopAfter(8)
    first.fit()
    build(config).fit()
    steps = [event["step"] for event in events(config, "save")]
    assert 8 in steps
    assert steps == sorted(set(steps))


def test_resume_keeps_the_event_of_a_save_that_ended_with_the_next_one(config, monkeypatch) -> None:
    config = dataclasses.replace(config, save_every=3, eval_every=100)
    first = build(config)
    monkeypatch.setattr(first.saver, "poll", lambda poll=first.saver.poll: poll() if waited else [])
    waited: list[None] = []
    wait = first.saver.wait
    monkeypatch.setattr(first.saver, "wait", lambda: (wait(), waited.append(None)))
    first.stop_signal = StopAfter(7)
    first.fit()
    build(config).fit()
    assert {3, 6, 7} <= {event["step"] for event in events(config, "save")}


def test_init_from_another_run(config, tmp_path) -> None:
    build(config).fit()
    other = Config(
        init_from=config.out_dir, input=config.input, out_dir=str(tmp_path / "two"), device="cpu",
        dtype="float32", context_length=32, batch_size=4, warmup_steps=1, max_steps=2,
    )  # fmt: skip
    trainer = build(other)
    assert trainer.config.n_embd == config.n_embd
    assert trainer.tokenizer.to_json() == read_tokenizer(last(config)).to_json()
    best = CheckpointStore(Path(config.out_dir) / "checkpoints").read_link("best")
    source = read_tensors(best, "model.safetensors")
    weight = trainer.step_fn.model.transformer["wpe"].weight
    assert torch.equal(weight, source["transformer.wpe.weight"])
    assert trainer.state.step == 0
    with pytest.raises(UserError, match=r"--n_embd 64, but .* has 32: leave --n_embd out"):
        build_trainer(
            dataclasses.replace(other, n_embd=64, out_dir=str(tmp_path / "three")),
            explicit={"n_embd"},
        )  # fmt: skip


def test_estimate_counts_whole_steps_and_evaluations(config, monkeypatch) -> None:
    monkeypatch.setattr(build_train_step, "dry_run", lambda *_: 8.0)
    monkeypatch.setattr(build_train_step, "time_optimizer", lambda _: 3600.0)
    config = dataclasses.replace(config, eval_every=5, max_steps=20)
    trainer = build(config)
    trainer.lock.release()
    text = estimate_duration(trainer.step_fn, config, steps=20, val_tokens=10**6)
    assert "for 4 evaluations on 1,000,000 held-out tokens, which" in text
    text = estimate_duration(trainer.step_fn, config, steps=20, val_tokens=10)
    assert "about 20.1 hours: 20 steps" in text and "evaluations" not in text
