"""Kernels of another package, which are used where it is installed, wanted and found to run."""

import dataclasses
from collections.abc import Callable

import torch

from gptforge.config import Config
from gptforge.distributed import Comm
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.files import cache_dir
from gptforge.kernel_select import first_line
from gptforge.kernels.gelu_products import prepare_quack, why_not_quack
from gptforge.train.train_step import TrainStep

Say = Callable[[str], None]

LONG_RUN = 4e17
"""FLOPs of a run from which on it pays that quack and its compiler start slowly: many seconds the
first time, of which it saves a few percent of what follows."""


def find_failure(step: TrainStep, config: Config) -> str:
    """Why the update does not run as it is written out, found out by trying it; empty if it does.

    Triton may be missing, or find no compiler or a driver too old; it raises whatever it likes.
    """
    # With as many windows as will be wanted: cuDNN makes its plans for each number anew. In shards
    # all ranks have to rehearse the same, whether or not one of them runs out of memory.
    for windows in (1,) if step.is_sharded else (config.batch_size, 1):
        try:
            step.dry_run(windows, config.context_length)
        except torch.OutOfMemoryError:
            # Found out about, with what would help, when the micro-batch is.
            continue
        except Exception as error:
            return first_line(error)
        return ""
    return ""


def choose_packages(step: TrainStep, config: Config, ranks: Comm, *, say: Say) -> None:
    """Let quack make the MLP's products where it is wanted and works.

    Raises:
        UserError: if it was asked for and cannot.
    """
    if config.mlp_matmul == "cublas":
        return
    flops = formulas.flops_per_token(config.model, config.context_length)
    if config.mlp_matmul == "auto" and flops * config.tokens_per_step * config.max_steps < LONG_RUN:
        return
    reason = "an update is not written out here"
    if step.kernels.manual_backward:
        reason = why_not_quack(step.device, step.precision.dtype)
    # Asked of all: a machine may lack the package that another one has.
    if ranks.all_true(not reason):
        reason = _use_quack(step, config, ranks)
        if ranks.all_true(not reason):
            say("the MLP's products: with its GELU inside, by quack")
            return
        if step.kernels.quack:
            step.set_kernels(dataclasses.replace(step.kernels, quack=False))
        reason = reason or "not on all ranks"
        say(f"note: the kernels of quack do not run here: {reason}")
    if config.mlp_matmul == "quack":
        raise UserError(f"--products quack cannot be: {reason or 'not on all ranks'}")


def _use_quack(step: TrainStep, config: Config, ranks: Comm) -> str:
    """Use it from now on; why that does not work, if it does not."""
    kernels = dataclasses.replace(step.kernels, quack=True)
    attempts = (lambda: prepare_quack(cache_dir()), lambda: step.set_kernels(kernels))
    for attempt in attempts:
        reason = _trouble_with(attempt)
        # Gone on with by all or none: in shards a rehearsal takes all.
        if not ranks.all_true(not reason):
            return reason or "not on all ranks"
    return find_failure(step, config)


def _trouble_with(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:
        return first_line(error)
    return ""
