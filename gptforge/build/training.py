"""From a Config to a Trainer: everything a run needs, checked, chosen and said."""

import dataclasses
import os
import platform
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import __version__, costs, files
from gptforge.checkpoint import store as checkpoints
from gptforge.checkpoint.lock import lock_run
from gptforge.checkpoint.run_folder import Opening, open_run
from gptforge.checkpoint.saver import BackgroundSaver
from gptforge.checkpoint.store import CheckpointStore
from gptforge.checkpoint.tensors import load_model_tensors
from gptforge.config import NOTES, Config, GPTConfig, check, to_toml
from gptforge.data.corpus import Corpus, build_corpus
from gptforge.data.loader import Loader
from gptforge.data.text import find_text, read_text
from gptforge.errors import RunError, UserError
from gptforge.evaluate.heldout import HeldOut
from gptforge.hardware import (
    Precision,
    attention_kernel,
    cache_folder,
    choose_device,
    choose_precision,
    free_memory,
    try_compile,
)
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.presets import PRESETS, preset
from gptforge.report.console import open_console
from gptforge.report.duration import in_words
from gptforge.report.run_report import RunReport
from gptforge.report.summary import model_summary
from gptforge.tokenizers import byte_lengths
from gptforge.train.anomalies import Watch
from gptforge.train.guards import StopGuard
from gptforge.train.micro_batch import find_micro_batch
from gptforge.train.progress import Progress, restore
from gptforge.train.step import TrainStep
from gptforge.train.trainer import Trainer

Say = Callable[[str], None]

SHAPE = frozenset(field.name for field in dataclasses.fields(GPTConfig)) - {"dropout"}


def build_trainer(
    config: Config,
    *,
    given: Collection[str],
    say: Say,
    program: str = "python gpt.py",
    command: str = "",
) -> Trainer | None:
    """Everything a run needs, checked and ready; None if the run in that folder is finished.

    Args:
        config: as merged from preset, file and flags.
        given: fields set by hand, in the file or by flags.
        say: told each choice, with its reason, as it is made.
        program: how the program is called, for the commands that it prints.
        command: its arguments, for the log.

    Raises:
        UserError: for anything the user can mend.
        RunError: if the disk has no room for a checkpoint.
    """
    config = _start_from(config, given)
    check(config)
    device, device_note = choose_device(config.device)
    precision = choose_precision(config.dtype, device)
    _seed(config)
    corpus = build_corpus(
        read_text(find_text(config.input)),
        tokenizer=config.tokenizer,
        val_fraction=config.val_fraction,
        context_length=config.context_length,
    )
    config = _settle(config, corpus)
    lock = lock_run(Path(config.out_dir))
    opening = open_run(config, given=given, tokenizer=corpus.tokenizer, text_sha256=corpus.sha256)
    config = opening.config
    for notice in (*corpus.text.notices, *opening.notices):
        say(f"note: {notice}")
    usual = preset(config.preset).warmup_steps if config.preset in PRESETS else 0
    if opening.status == "new" and "warmup_steps" not in given and config.warmup_steps < usual:
        say(f"note: the preset's warmup of {usual} steps is cut to {config.warmup_steps}")
    if opening.status == "finished":
        say(_finished(config, program))
        return None

    say(f"text: {_describe_corpus(corpus, config)}")
    say(f"device: {device} ({device_note}), {_name(precision)}: {precision.reason}")
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    store.require_space(costs.checkpoint_bytes(config.model))
    step = _train_step(config, opening, device, precision, given=given, say=say)
    loader = Loader(
        corpus.train,
        context_length=config.context_length,
        global_batch=config.global_batch,
        seed=config.seed,
        shuffle=config.shuffle,
        device=device,
    )
    progress = Progress()
    if opening.checkpoint is not None:
        progress = restore(opening.checkpoint, step, loader)
    say(_estimate(step, config, steps=config.max_steps - progress.step))

    whole_command = f"{program} {command}".strip()
    config_text = to_toml(config, {**_versions(), "command": whole_command})
    report = RunReport(
        Path(config.out_dir),
        title=f"{config.preset or 'GPT-2'} on {corpus.text.path.name}",
        program=program,
    )
    _open_report(report, config, opening, step, progress, config_text=config_text)
    return Trainer(
        config=config,
        train_step=step,
        loader=loader,
        held_out=_held_out(corpus, config, batch_size=step.micro_batch),
        tokenizer=corpus.tokenizer,
        saver=BackgroundSaver(
            store, tokenizer=corpus.tokenizer, config=config_text, keep=config.keep
        ),
        report=report,
        guard=StopGuard(config.time_limit, say=lambda text: report.console.say(text)),
        # A GPU works behind our backs: two steps later its numbers are ready to be read.
        watch=Watch(lag=2 if device.type == "cuda" else 0, scaled=precision.needs_scaler),
        text_sha256=corpus.sha256,
        progress=progress,
        lock=lock,
    )


def _start_from(config: Config, given: Collection[str]) -> Config:
    """With `--init_from`, shape and tokenizer are the checkpoint's, unless set by hand."""
    if not config.init_from:
        return config
    # A run that was begun this way has a tokenizer and a shape of its own by now.
    own = CheckpointStore(Path(_out_dir(config)) / "checkpoints").pointed("last")
    path = own if own and not config.overwrite else checkpoints.resolve(config.init_from)
    if reason := checkpoints.damage(path):
        raise UserError(f"--init_from {config.init_from} is damaged: {reason}")
    source = checkpoints.read_config(path)
    taken = {name: getattr(source, name) for name in SHAPE if name not in given}
    if "tokenizer" not in given:
        taken["tokenizer"] = (path / checkpoints.TOKENIZER).as_posix()
    if "context_length" not in given:
        taken["context_length"] = min(config.context_length, source.block_size)
    return dataclasses.replace(config, **taken)


def _settle(config: Config, corpus: Corpus) -> Config:
    """Fill in what was left to the program: vocabulary, run folder, text."""
    size = corpus.tokenizer.size
    vocab_size = config.vocab_size or -(-size // 64) * 64
    if vocab_size < size:
        raise UserError(
            f"--vocab_size {vocab_size} is less than the {size} ids of --tokenizer "
            f"{config.tokenizer}: give {size} or more, or leave it out"
        )
    path = corpus.text.path.as_posix()
    return dataclasses.replace(config, vocab_size=vocab_size, out_dir=_out_dir(config), input=path)


def _out_dir(config: Config) -> str:
    return config.out_dir or f"runs/{config.preset or 'custom'}"


def _seed(config: Config) -> None:
    torch.manual_seed(config.seed)
    # TF32 where weights stay float32: what "mixed precision" leaves behind is fast as well.
    torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # cuBLAS reads this when it starts, and torch insists on it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _train_step(
    config: Config,
    opening: Opening,
    device: torch.device,
    precision: Precision,
    *,
    given: Collection[str],
    say: Say,
) -> TrainStep:
    """Model and optimizer on their device, compiled if that works; says what was chosen."""
    model = _model(config, opening).to(device)
    betas = (config.beta1, config.beta2)
    by_hand = "batch_size" in given
    step = TrainStep(
        model,
        build_adamw(model, betas=betas, weight_decay=config.weight_decay),
        precision=precision,
        micro_batch=config.batch_size,
        grad_clip=config.grad_clip,
        may_shrink=not by_hand,
        say=say,
    )
    step.micro_batch = _micro_batch(step, config, by_hand=by_hand)
    windows = f"{config.global_batch} windows a step in micro-batches of {step.micro_batch}"
    say(f"attention: {_attention(step, config)}; {windows}")

    def attempt() -> None:
        step.compile()
        step.rehearse(step.micro_batch, config.context_length)

    try:
        compiled, reason = try_compile(config.compile, device, attempt)
        if not compiled:
            step.drop_compiled()
            if device.type == "cuda":
                step.rehearse(step.micro_batch, config.context_length)
    except torch.OutOfMemoryError:
        raise RunError(_what_would_fit(step, config)) from None
    say(f"torch.compile: {'on' if compiled else 'off'}, {reason}")
    return step


def _attention(step: TrainStep, config: Config) -> str:
    return attention_kernel(
        step.device,
        step.precision.dtype,
        n_head=config.n_head,
        head_size=config.n_embd // config.n_head,
        context_length=config.context_length,
    )


def _open_report(
    report: RunReport,
    config: Config,
    opening: Opening,
    step: TrainStep,
    progress: Progress,
    *,
    config_text: str,
) -> None:
    """Make the run folder, or cut it back to where the run goes on.

    The first change that a start makes: whatever could be wrong has been found by now.
    """
    folder = report.folder
    if opening.replaces:
        aside = files.set_aside(folder, "old")
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
            "dtype": _name(step.precision),
            "compiled": step.is_compiled,
            "attention": _attention(step, config),
            "micro_batch": step.micro_batch,
            **_versions(),
        }
        report.begin(model_summary(step.model), command=command, facts=facts)
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


def _model(config: Config, opening: Opening) -> GPT:
    model = GPT(config.model)
    if opening.checkpoint is not None:
        path = opening.checkpoint
    elif config.init_from:
        path = checkpoints.resolve(config.init_from)
    else:
        return model.initialize(torch.Generator().manual_seed(config.seed))
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL)
    load_model_tensors(model, tensors, source=path.as_posix())
    return model


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


def _micro_batch(step: TrainStep, config: Config, *, by_hand: bool) -> int:
    """Windows that go through the model at once: those asked for, fewer where memory is short."""
    device, length, most = step.device, config.context_length, config.batch_size
    is_gpu = device.type == "cuda"
    if by_hand:
        return most
    mixed, name = step.precision.is_mixed, str(device)
    if is_gpu:
        name = torch.cuda.get_device_name(device)
    return find_micro_batch(
        most,
        estimate=lambda n: costs.training_bytes(config.model, length, n, mixed=mixed),
        free=free_memory(device),
        # A machine that runs out of memory gives no error: it kills. So a CPU is not tried.
        fits=lambda n: not is_gpu or step.fits(n, length),
        remembered=cache_folder() / "micro_batches.json" if is_gpu else None,
        key=f"{config.model} {length} {step.precision.dtype} {torch.__version__} {name}",
    )


def _what_would_fit(step: TrainStep, config: Config) -> str:
    """Words for a micro-batch that is too large, with one that is not; tried out, not compiled."""
    step.drop_compiled()
    # Only a divisor keeps the global batch, and with it what is learned.
    smaller = [n for n in range(step.micro_batch - 1, 0, -1) if config.global_batch % n == 0]
    fitting = next((n for n in smaller if step.fits(n, config.context_length)), None)
    too_large = f"--batch_size {step.micro_batch} does not fit into the memory of {step.device}"
    if fitting is None:
        return f"{too_large}, nor does less: use a smaller --context_length or model"
    return (
        f"{too_large}; --batch_size {fitting} --gradient_accumulation_steps "
        f"{config.global_batch // fitting} would, and learns the same"
    )


def _estimate(step: TrainStep, config: Config, *, steps: int) -> str:
    """How long training will take, from a rehearsal on this machine."""
    # A few windows tell enough where a whole micro-batch would take minutes.
    few = max(1, 2048 // config.context_length)
    fast = step.is_compiled or step.device.type == "cuda"
    windows = step.micro_batch if fast else min(step.micro_batch, few)
    seconds = step.rehearse(windows, config.context_length)
    if seconds < 1:
        # The first pass over a shape pays for warming up.
        seconds = min(step.rehearse(windows, config.context_length) for _ in range(3))
    total = seconds / windows * config.global_batch * steps
    return (
        f"this will take about {in_words(total)}: {steps:,} steps of {config.tokens_per_step:,} "
        f"tokens, {costs.parameters(config.model):,} parameters"
    )


def _describe_corpus(corpus: Corpus, config: Config) -> str:
    train, held_out = len(corpus.train), len(corpus.held_out)
    epochs = config.max_steps * config.tokens_per_step / train
    held = f"{held_out:,} held out" if held_out else "none held out"
    if 0 < config.eval_tokens < held_out:
        held += f", of which {config.eval_tokens:,}, evenly spread, judge as it goes"
    return (
        f"{corpus.text.path.as_posix()}, {len(corpus.text.content):,} characters; {train:,} "
        f"{corpus.tokenizer.name} tokens to learn from, {held}; about {epochs:.1f} epochs"
    )


def _finished(config: Config, program: str) -> str:
    return (
        f"{config.out_dir} is finished: {config.max_steps} steps are made. Raise --max_steps to go "
        f"on, --overwrite to start anew, or try it: {program} sample {config.out_dir}"
    )


def _name(precision: Precision) -> str:
    return str(precision.dtype).removeprefix("torch.")
