"""From a Config to a Trainer: everything a run needs, checked, chosen and said."""

import contextlib
import dataclasses
import os
import platform
import time
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import __version__, costs, files
from gptforge.build.fitting import refuse_too_large
from gptforge.build.parallel import check_shares, open_together
from gptforge.build.settled import (
    check_tokenizer,
    describe_corpus,
    open_text,
    out_dir_of,
    settle,
    start_from,
)
from gptforge.build.step import attention_of, estimate, train_step
from gptforge.build.warm_up import WarmUp
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.lock import lock_run
from gptforge.checkpoint.run_folder import Opening, check_folder, is_put_away
from gptforge.checkpoint.saver import BackgroundSaver, NoSaver
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import NOTES, SEED_LIMIT, Config, check, to_toml
from gptforge.data.corpus import Corpus
from gptforge.data.loader import Loader
from gptforge.distributed import ALONE, Ranks
from gptforge.evaluate.heldout import HeldOut
from gptforge.hardware import (
    choose_device,
    choose_precision,
)
from gptforge.holding import Hold, NoHold
from gptforge.model import GPT
from gptforge.presets import PRESETS, preset
from gptforge.report.console import open_console
from gptforge.report.meter import open_meter
from gptforge.report.run_report import RunReport
from gptforge.report.summary import model_summary
from gptforge.report.unwritten import Silence, Unwritten
from gptforge.shell import quote
from gptforge.tokenizers import byte_lengths
from gptforge.train.anomalies import Watch
from gptforge.train.guards import StopGuard
from gptforge.train.progress import Progress, restore
from gptforge.train.step import TrainStep
from gptforge.train.trainer import Trainer

Say = Callable[[str], None]


def build_trainer(
    config: Config,
    *,
    given: Collection[str],
    say: Say,
    program: str = "python gpt.py",
    command: str = "",
    ranks: Ranks = ALONE,
    started: float | None = None,
) -> Trainer | None:
    """Everything a run needs, checked and ready; None if the run in that folder is finished.

    Args:
        config: as merged from preset, file and flags.
        given: fields set by hand, in the file or by flags.
        say: told each choice, with its reason, as it is made.
        program: how the program is called, for the commands that it prints.
        command: its arguments, for the log.
        ranks: who trains together; all of them build, rank 0 alone looks into the run folder.
        started: `time.monotonic()` when the time limit began to count; by default now.

    Raises:
        UserError: for anything the user can mend.
        RunError: if the disk has no room for a checkpoint.
    """
    started = time.monotonic() if started is None else started
    asked = config
    config = Config(**ranks.on_first(lambda: vars(start_from(asked, given, say))))
    check(config)
    if ranks.is_first:
        check_folder(dataclasses.replace(config, out_dir=out_dir_of(config)))
    check_shares(config, ranks)
    device, device_note = choose_device(ranks.local_device or config.device)
    precision = choose_precision(config.dtype, device)
    seed_everything(config, rank=ranks.rank)
    # Behind what cuBLAS reads when it starts.
    warm_up = WarmUp(device, config, precision)
    # What one has prepared, the others of its machine find.
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        say(text)

    with ranks.local_first(), open_meter("preparing the text") as meter:
        corpus = open_text(config, given, tell, meter)
    ranks.on_first(lambda: check_tokenizer(config, corpus.tokenizer, prepared=corpus.prepared_as))
    config = settle(config, corpus)
    is_read_only = is_put_away(Path(config.out_dir))
    lock = lock_run(Path(config.out_dir)) if ranks.is_first and not is_read_only else NoHold()
    with contextlib.ExitStack() as unless_built:
        unless_built.callback(lock.close)
        opening = open_together(config, corpus, given, ranks, asked=asked)
        config = opening.config
        for notice in (*corpus.notices, *opening.notices):
            # What was prepared just now has been told of.
            if (text := f"note: {notice}") not in told:
                say(text)
        usual = preset(config.preset).warmup_steps if config.preset in PRESETS else 0
        if opening.status == "new" and "warmup_steps" not in given and config.warmup_steps < usual:
            say(f"note: the preset's warmup of {usual} steps is cut to {config.warmup_steps}")
        if opening.status == "finished":
            say(_finished(config, program))
            return None

        say(f"text: {describe_corpus(corpus, config)}")
        say(f"device: {device} ({device_note}), {precision.name}: {precision.reason}")
        store = CheckpointStore(
            Path(config.out_dir) / "checkpoints",
            again="the same command without --overwrite"
            if config.overwrite
            else "the same command",
        )
        if ranks.is_first:
            store.require_space(costs.checkpoint_bytes(config.model))
        if ranks.size == 1:
            refuse_too_large(config, device, precision, by_hand="batch_size" in given)
        step = train_step(
            config,
            opening,
            device,
            precision,
            given=given,
            say=say,
            ranks=ranks,
            ready=warm_up.wait,
        )
        loader = Loader(
            corpus.train,
            context_length=config.context_length,
            global_batch=config.global_batch,
            seed=config.seed,
            shuffle=config.shuffle,
            stagger=config.stagger,
            device=device,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        progress = Progress()
        if opening.checkpoint is not None:
            progress = restore(opening.checkpoint, step, loader, ranks)
        held_out = _held_out(corpus, config, batch_size=step.micro_batch)
        left, judged = config.max_steps - progress.step, held_out.tokens if held_out else 0
        say(estimate(step, config, steps=left, judged=judged, ranks=ranks))

        whole_command = f"{program} {command}".strip()
        config_text = to_toml(config, {**_versions(), "command": whole_command})
        report = (RunReport if ranks.is_first else Unwritten)(
            Path(config.out_dir),
            title=f"{config.preset or 'GPT-2'} on {corpus.path.name}",
            program=program,
            how_to_part=corpus.how_to_part,
        )
        if ranks.is_first:
            _open_report(
                report, lock, config, opening, step, progress, ranks, config_text=config_text
            )
        else:
            report.console = Silence()
        lag = 2 if device.type == "cuda" else 0
        trainer = Trainer(
            config=config,
            train_step=step,
            loader=loader,
            held_out=held_out,
            tokenizer=corpus.tokenizer,
            saver=(BackgroundSaver if ranks.is_first else NoSaver)(
                store, tokenizer=corpus.tokenizer, config=config_text, keep=config.keep
            ),
            report=report,
            guard=StopGuard(
                config.time_limit, say=lambda text: report.console.say(text), started=started
            ),
            # A GPU works behind our backs: two steps later its numbers are ready to be read.
            watch=Watch(lag=lag, scaled=precision.needs_scaler),
            text_sha256=corpus.sha256,
            inputs=sorted(corpus.inputs_of("train")),
            progress=progress,
            lock=lock,
            ranks=ranks,
            wishes=ranks.agreement(lag),
        )
        unless_built.pop_all()
        return trainer


def seed_everything(config: Config, *, rank: int = 0) -> None:
    """Dice, and which kinds of products are let in, before anything is built."""
    # Ranks that dropped the same activations would learn less from their parts.
    torch.manual_seed((config.seed + rank * 0x9E3779B97F4A7C15) % SEED_LIMIT)
    # TF32 where weights stay float32: what "mixed precision" leaves behind is fast as well.
    torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # cuBLAS reads this when it starts, and torch insists on it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _open_report(
    report: RunReport,
    lock: Hold,
    config: Config,
    opening: Opening,
    step: TrainStep,
    progress: Progress,
    ranks: Ranks,
    *,
    config_text: str,
) -> None:
    """Make the run folder, or cut it back to where the run goes on.

    The first change that a start makes: whatever could be wrong has been found by now.
    """
    folder = report.folder
    if opening.replaces:
        aside = lock.set_aside("old")
        report.console.say(f"note: moved the old {folder.as_posix()} to {aside.as_posix()}")
    folder.mkdir(parents=True, exist_ok=True)
    if opening.status == "new":
        report.clear()
    files.write_atomic(folder / checkpoints.CONFIG, config_text)
    command = tomllib.loads(config_text)[NOTES]["command"]
    if opening.checkpoint is None:
        facts = {
            "parameters": costs.parameters(config.model),
            "device": str(step.device),
            "dtype": step.precision.name,
            "compiled": step.is_compiled,
            "attention": attention_of(step, config),
            "micro_batch": step.micro_batch,
            "ranks": ranks.size,
            **_versions(),
        }
        # As it is before anything is wrapped around it.
        summary = model_summary(GPT.outlined(config.model))
        report.begin(summary, command=command, facts=facts)
    else:
        sizes, name = opening.state["file_sizes"], opening.checkpoint.name
        is_best = progress.best_step == progress.step
        report.resume(progress.step, sizes, checkpoint=name, is_best=is_best, command=command)
        report.console.say(f"going on from {name}: step {progress.step} of {config.max_steps}")
    report.console = open_console(total=config.max_steps, done=progress.step)


def _versions() -> dict[str, str]:
    return {
        "gptforge": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _held_out(corpus: Corpus, config: Config, *, batch_size: int) -> HeldOut | None:
    if len(corpus.held_out) == 0:
        return None
    return HeldOut(
        corpus.held_out,
        byte_lengths(corpus.tokenizer),
        context_length=config.context_length,
        batch_size=batch_size,
        limit=config.eval_tokens,
    )


def _finished(config: Config, program: str) -> str:
    return (
        f"{config.out_dir} is finished: {config.max_steps} steps are made. Raise --max_steps to go "
        f"on, --overwrite to start anew, or try it: {program} sample {quote(config.out_dir)}"
    )
