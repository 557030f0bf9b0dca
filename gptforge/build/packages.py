"""Kernels of other packages, which are used where they are installed, wanted and found to run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptforge import costs
from gptforge.config import Config
from gptforge.distributed import Ranks
from gptforge.errors import UserError
from gptforge.hardware import cache_folder, first_line
from gptforge.kernels.gelu_products import prepare_quack, why_not_quack
from gptforge.kernels.packed_attention import prepare_flash4, why_not_flash4
from gptforge.train.step import TrainStep

Say = Callable[[str], None]

LONG_RUN = 4e17
"""FLOPs of a run from which on it pays that these packages and their compilers start slowly: half a
minute the first time, of which they save a few percent of what follows."""


def trouble_of(step: TrainStep, config: Config) -> str:
    """Why the update does not run as it is written out, found out by trying it; empty if it does.

    Triton may be missing, or find no compiler or a driver too old; it raises whatever it likes.
    """
    # With as many windows as will be wanted: cuDNN makes its plans for each number anew. In shards
    # all ranks have to rehearse the same, whether or not one of them runs out of memory.
    for windows in (1,) if step.is_sharded else (config.batch_size, 1):
        try:
            step.rehearse(windows, config.context_length)
        except torch.OutOfMemoryError:
            # Found out about, with what would help, when the micro-batch is.
            continue
        except Exception as error:
            return first_line(error)
        return ""
    return ""


def choose_packages(step: TrainStep, config: Config, ranks: Ranks, *, say: Say) -> None:
    """Let FlashAttention-4 and quack take their parts where they are wanted and work."""
    if config.attention == "torch":
        return
    flops = costs.flops_per_token(config.model, config.context_length)
    if config.attention == "auto" and flops * config.tokens_per_step * config.max_steps < LONG_RUN:
        return
    head_size, dtype = config.n_embd // config.n_head, step.precision.dtype
    against = "" if step.kernels.by_hand else "an update is not written out here"
    reason = _choose_package(
        "flash4",
        against or why_not_flash4(step.device, dtype, head_size=head_size, dropout=config.dropout),
        prepare_flash4,
        (step, config, ranks),
        say=say,
    )
    if reason and config.attention == "flash4":
        raise UserError(f"--attention flash4 cannot be: {reason}")
    against = against or why_not_quack(step.device, dtype)
    if not _choose_package("quack", against, prepare_quack, (step, config, ranks), say=say):
        say("the MLP's products: with its GELU inside, by quack")


def _choose_package(
    name: str,
    against: str,
    prepare: Callable[[Path], None],
    where: tuple[TrainStep, Config, Ranks],
    *,
    say: Say,
) -> str:
    """Use the kernels of a package from now on, if they run; why not, if they are not used.

    Args:
        name: the field of `Kernels`.
        against: what speaks against it before it is tried.
        prepare: imports it.
        where: the update, its configuration and all who make it.
        say: told if it was tried and does not run.
    """
    step, config, ranks = where
    # Asked of all: a machine may lack the package that another one has.
    if not ranks.all_of(not against):
        return against or "not on all ranks"
    plain = step.kernels
    added: dict[str, Any] = {name: True}
    reason = _trouble_with(lambda: prepare(cache_folder()))
    # Rehearsed by all or none: in shards it takes all.
    if ranks.all_of(not reason):
        step.use(dataclasses.replace(plain, **added))
        reason = trouble_of(step, config)
        if ranks.all_of(not reason):
            return ""
        step.use(plain)
    reason = reason or "not on all ranks"
    say(f"note: the kernels of {name} do not run here: {reason}")
    return reason


def _trouble_with(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:
        return first_line(error)
    return ""
