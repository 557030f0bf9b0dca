"""From a configuration to its plan: settled and checked as for training, then counted."""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptforge import costs, files
from gptforge.build.parallel import wants_shards
from gptforge.build.rehearsal import rehearse
from gptforge.build.settled import check_tokenizer, open_text, out_dir_of, settle, start_from
from gptforge.checkpoint.run_folder import as_begun, check_folder
from gptforge.checkpoint.store import SPARE_BYTES, CheckpointStore, damage
from gptforge.config import Config, check
from gptforge.data.corpus import Corpus
from gptforge.data.loader import windows_of_epoch
from gptforge.distributed import ALONE
from gptforge.errors import RunError
from gptforge.hardware import choose_device, choose_precision
from gptforge.plan.figures import AS_GOOD_AS_NEW, Disk, Flops, Model, Plan, Run, Step, Text, Time
from gptforge.plan.memory import Need
from gptforge.report.meter import open_meter

Say = Callable[[str], None]

NO_TIME = Time(None, None, None, "not measured: it does not fit into memory")


def make_plan(config: Config, given: Collection[str], say: Say) -> Plan:
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
        config = start_from(config, given, say, scratch=Path(scratch))
        check(config)
        check_folder(dataclasses.replace(config, out_dir=out_dir_of(config)))
        device, device_note = choose_device(config.device)
        precision = choose_precision(config.dtype, device)
        with open_meter("preparing the text") as meter:
            corpus = open_text(config, given, say, meter)
        check_tokenizer(config, corpus.tokenizer, prepared=corpus.prepared_as)
    config = settle(config, corpus)
    steps = CheckpointStore(Path(config.out_dir) / "checkpoints").steps()
    begun = next((path for path in reversed(steps) if damage(path) is None), None)
    if begun and not config.overwrite:
        config = as_begun(
            begun,
            config,
            given=given,
            tokenizer=corpus.tokenizer,
            text_sha256=corpus.sha256,
        )
    wants_shards(config, device, precision, ALONE, say)
    for notice in corpus.notices:
        say(f"note: {notice}")

    need = Need(config, precision, device)
    by_hand = "batch_size" in given
    micro_batch = config.batch_size if by_hand else need.micro_batch()
    memory = need.memory(micro_batch, f"{device} ({device_note}), {precision.name}")
    model, run, disk = _model(config), _run(config, corpus), _disk(config, corpus)
    per_token = costs.flops_per_token(config.model, config.context_length)
    per_step = per_token * config.tokens_per_step
    warnings = [advice_on_reading(config, run, tokens=len(corpus.train))]
    if not memory.fits:
        warnings.append(f"memory: {need.remedy(micro_batch, by_hand=by_hand)}")
    if not disk.fits:
        warnings.append(_disk_remedy(disk))
    return Plan(
        ok=memory.fits and disk.fits,
        model=model,
        text=_text(corpus, prepared_now=meter.total > 0),
        step=Step(
            config.global_batch,
            config.context_length,
            config.tokens_per_step,
            micro_batch,
            config.batch_size,
        ),
        run=run,
        flops=Flops(per_token, per_step, per_step * config.max_steps),
        memory=memory,
        disk=disk,
        time=_time(config, given, device, micro_batch) if memory.fits else NO_TIME,
        warnings=tuple(warning for warning in warnings if warning),
    )


def advice_on_reading(config: Config, run: Run, *, tokens: int) -> str:
    """What to do about a text that is read too often by a model too large for it; or nothing.

    A model with a parameter for each token has room for the text itself: GPTs hold about 3.6 bits a
    parameter (Morris et al., "How much do language models memorize?", 2025), and a token of plain
    text, once the language is known, has a few bits to be remembered. Whether it comes to that
    depends on how often it is read. Dropout puts it off, by how much is not known beforehand.
    """
    parameters = costs.parameters(config.model)
    if run.epochs <= AS_GOOD_AS_NEW or tokens >= parameters or config.dropout:
        return ""
    kept = "; the checkpoint that does best on the held-out text is kept"
    return (
        f"by heart: the text is read {run.epochs:.1f} times by a model with "
        f"{parameters / tokens:.1f} parameters for each of its tokens, which will come to know it "
        "by heart: use more text, a smaller model or --dropout"
        f"{kept if config.val_fraction else ''}"
    )


def _model(config: Config) -> Model:
    c, count = config, costs.parameters(config.model)
    rest = count - costs.tables(config.model)
    return Model(c.preset, c.n_layer, c.n_embd, c.n_head, c.block_size, c.vocab_size, count, rest)


def _text(corpus: Corpus, *, prepared_now: bool) -> Text:
    return Text(
        path=corpus.path.as_posix(),
        characters=corpus.characters,
        bytes=corpus.bytes,
        tokenizer=corpus.tokenizer.name,
        tokenizer_ids=corpus.tokenizer.size,
        tokens=len(corpus.train),
        held_out_tokens=len(corpus.held_out),
        prepared_now=prepared_now,
    )


def _run(config: Config, corpus: Corpus) -> Run:
    tokens = config.max_steps * config.tokens_per_step
    windows = windows_of_epoch(len(corpus.train), config.context_length, stagger=config.stagger)
    return Run(
        steps=config.max_steps,
        tokens=tokens,
        epochs=config.max_steps * config.global_batch / windows,
        tokens_per_parameter=tokens / costs.parameters(config.model),
    )


def _disk(config: Config, corpus: Corpus) -> Disk:
    saves = math.ceil(config.max_steps / config.save_every)
    if len(corpus.held_out):
        # Each of them may be the best so far.
        saves += config.max_steps // config.eval_every
    # best, last, those that --keep names, and the one that is being written.
    most = min(saves, config.keep + 3)
    one = costs.checkpoint_bytes(config.model)
    free = files.free_bytes(Path(config.out_dir))
    needed = most * one + SPARE_BYTES
    there = CheckpointStore(Path(config.out_dir) / "checkpoints").steps()
    saved = int(there[-1].name.removeprefix("step-")) if there else 0
    return Disk(config.out_dir, one, most, needed, free, needed <= free, saved)


def _disk_remedy(disk: Disk) -> str:
    if disk.free_bytes < disk.checkpoint_bytes + SPARE_BYTES:
        return "disk: not even one checkpoint has room; make some, or give another --out_dir"
    return "disk: it would fill up on the way; make room, or give a smaller --keep"


def _time(config: Config, given: Collection[str], device: torch.device, micro_batch: int) -> Time:
    try:
        rehearsal = rehearse(config, given, device=device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError) as error:
        return dataclasses.replace(NO_TIME, how=f"not measured: {error}")
    a_step = rehearsal.seconds_a_window * config.global_batch
    return Time(
        seconds=a_step * config.max_steps,
        seconds_a_step=a_step,
        tokens_per_second=config.tokens_per_step / a_step,
        how=f"measured here: {rehearsal.how}",
    )
