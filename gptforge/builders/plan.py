"""From a configuration to its plan: settled and checked as for training, then counted."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import files
from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.builders.parallel import use_fsdp
from gptforge.builders.resolve import (
    check_tokenizer,
    load_dataset,
    resolve_config,
    resolve_init_from,
    resolve_out_dir,
)
from gptforge.builders.step_timing import time_step
from gptforge.checkpoint.run_dir import check_out_dir, resume_config
from gptforge.checkpoint.store import HEADROOM_BYTES, CheckpointStore, find_corruption
from gptforge.config import Config, validate
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset
from gptforge.device import select_device, select_precision
from gptforge.distributed import SINGLE_PROCESS
from gptforge.errors import RunError
from gptforge.estimate import formulas
from gptforge.estimate.plan import (
    MAX_USEFUL_EPOCHS,
    DatasetPlan,
    DiskPlan,
    FlopsPlan,
    ModelPlan,
    RunPlan,
    StepPlan,
    TimePlan,
    TrainingPlan,
)
from gptforge.report.progress import ProgressMeter

Say = Callable[[str], None]

NOT_MEASURED = TimePlan(None, None, None, "not measured: it does not fit into memory")


def make_plan(config: Config, explicit: Collection[str], log: Say) -> TrainingPlan:
    """Settle a configuration as training does, and work out what it comes to.

    The run folder is only looked at. A text that was never used before is prepared, and kept in the
    user's cache, where training finds it.

    Args:
        config: as merged from preset, file and flags.
        given: fields set by hand.
        say: told what training would be told of the text.

    Raises:
        UserError: for what training would refuse, in the same words.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = resolve_init_from(config, explicit, log, temp_dir=Path(scratch))
        validate(config)
        check_out_dir(dataclasses.replace(config, out_dir=resolve_out_dir(config)))
        device, device_note = select_device(config.device)
        precision = select_precision(config.dtype, device)
        with ProgressMeter("preparing the text") as meter:
            corpus = load_dataset(config, explicit, log, meter)
        check_tokenizer(config, corpus.tokenizer, prepared_path=corpus.prepared_dir)
    config = resolve_config(config, corpus)
    steps = CheckpointStore(Path(config.out_dir) / "checkpoints").checkpoints()
    begun = next((path for path in reversed(steps) if find_corruption(path) is None), None)
    if begun and not config.restart:
        config = resume_config(
            begun,
            config,
            explicit=explicit,
            tokenizer=corpus.tokenizer,
            text_sha256=corpus.sha256,
        )
    use_fsdp(config, device, precision, SINGLE_PROCESS, log)
    for notice in corpus.notices:
        log(f"note: {notice}")

    need = MemoryEstimator(config, precision, device)
    by_hand = "batch_size" in explicit
    micro_batch = config.batch_size if by_hand else need.micro_batch()
    memory = need.estimate(micro_batch, f"{device} ({device_note}), {precision.name}")
    model, run, disk = _model(config), _run(config, corpus), _disk(config, corpus)
    per_token = formulas.flops_per_token(config.model, config.context_length)
    per_step = per_token * config.tokens_per_step
    warnings = [memorization_warning(config, run, tokens=len(corpus.train))]
    if not memory.fits:
        warnings.append(f"memory: {need.suggest_fix(micro_batch, is_explicit=by_hand)}")
    if not disk.fits:
        warnings.append(_disk_remedy(disk))
    return TrainingPlan(
        ok=memory.fits and disk.fits,
        model=model,
        text=_text(corpus, prepared_now=meter.total > 0),
        step=StepPlan(
            config.global_batch_size,
            config.context_length,
            config.tokens_per_step,
            micro_batch,
            config.batch_size,
        ),
        run=run,
        flops=FlopsPlan(per_token, per_step, per_step * config.max_steps),
        memory=memory,
        disk=disk,
        time=_time(config, explicit, device, micro_batch) if memory.fits else NOT_MEASURED,
        warnings=tuple(warning for warning in warnings if warning),
    )


def memorization_warning(config: Config, run: RunPlan, *, tokens: int) -> str:
    """What to do about a text that is read too often by a model too large for it; or nothing.

    A model with a parameter for each token has room for the text itself: GPTs hold about 3.6 bits a
    parameter (Morris et al., "How much do language models memorize?", 2025), and a token of plain
    text, once the language is known, has a few bits to be remembered. Whether it comes to that
    depends on how often it is read. Dropout puts it off, by how much is not known beforehand.
    """
    parameters = formulas.num_params(config.model)
    if run.epochs <= MAX_USEFUL_EPOCHS or tokens >= parameters or config.dropout:
        return ""
    kept = "; the checkpoint that does best on the held-out text is kept"
    return (
        f"by heart: the text is read {run.epochs:.1f} times by a model with "
        f"{parameters / tokens:.1f} parameters for each of its tokens, which will come to know it "
        "by heart: use more text, a smaller model or --dropout"
        f"{kept if config.val_fraction else ''}"
    )


def _model(config: Config) -> ModelPlan:
    c, count = config, formulas.num_params(config.model)
    rest = count - formulas.num_embedding_params(config.model)
    return ModelPlan(
        c.preset, c.n_layer, c.n_embd, c.n_head, c.block_size, c.vocab_size, count, rest
    )


def _text(corpus: Dataset, *, prepared_now: bool) -> DatasetPlan:
    return DatasetPlan(
        path=corpus.path.as_posix(),
        characters=corpus.characters,
        bytes=corpus.bytes,
        tokenizer=corpus.tokenizer.name,
        tokenizer_ids=corpus.tokenizer.vocab_size,
        tokens=len(corpus.train),
        held_out_tokens=len(corpus.val),
        prepared_now=prepared_now,
    )


def _run(config: Config, corpus: Dataset) -> RunPlan:
    tokens = config.max_steps * config.tokens_per_step
    windows = sequences_per_epoch(
        len(corpus.train), config.context_length, random_offset=config.random_offset
    )
    return RunPlan(
        steps=config.max_steps,
        tokens=tokens,
        epochs=config.max_steps * config.global_batch_size / windows,
        tokens_per_parameter=tokens / formulas.num_params(config.model),
    )


def _disk(config: Config, corpus: Dataset) -> DiskPlan:
    saves = math.ceil(config.max_steps / config.save_every)
    if len(corpus.val):
        # Each of them may be the best so far.
        saves += config.max_steps // config.eval_every
    # best, last, those that --keep names, and the one that is being written.
    most = min(saves, config.keep_checkpoints + 3)
    one = formulas.checkpoint_bytes(config.model)
    free = files.free_disk_bytes(Path(config.out_dir))
    needed = most * one + HEADROOM_BYTES
    there = CheckpointStore(Path(config.out_dir) / "checkpoints").checkpoints()
    saved = int(there[-1].name.removeprefix("step-")) if there else 0
    return DiskPlan(config.out_dir, one, most, needed, free, needed <= free, saved)


def _disk_remedy(disk: DiskPlan) -> str:
    if disk.free_bytes < disk.checkpoint_bytes + HEADROOM_BYTES:
        return "disk: not even one checkpoint has room; make some, or give another --out_dir"
    return "disk: it would fill up on the way; make room, or give a smaller --keep"


def _time(
    config: Config, given: Collection[str], device: torch.device, micro_batch: int
) -> TimePlan:
    try:
        rehearsal = time_step(config, given, device=device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError) as error:
        return dataclasses.replace(NOT_MEASURED, how=f"not measured: {error}")
    a_step = rehearsal.seconds_per_sequence * config.global_batch_size
    return TimePlan(
        seconds=a_step * config.max_steps,
        seconds_per_step=a_step,
        tokens_per_second=config.tokens_per_step / a_step,
        how=f"measured here: {rehearsal.how}",
    )
