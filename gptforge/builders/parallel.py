"""What several ranks have to agree on before they build: shares, shards, and the run folder."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from hashlib import sha256
from typing import Any

import torch

from gptforge import __version__
from gptforge.builders.memory_fit import estimate_memory
from gptforge.checkpoint.run_dir import OpenedRun, open_run
from gptforge.config import Config
from gptforge.data.dataset import Dataset
from gptforge.device import Precision, usable_memory
from gptforge.distributed import Comm
from gptforge.errors import UserError
from gptforge.kernel_select import DEFAULT_KERNELS
from gptforge.shell import env_int
from gptforge.train.micro_batch import MAX_MEMORY_FRACTION

Say = Callable[[str], None]


def check_global_batch(config: Config, comm: Comm) -> None:
    """Raise a UserError unless every rank gets as many windows of a global batch."""
    if config.global_batch_size % comm.world_size == 0:
        return
    size, batch = comm.world_size, config.batch_size
    step = size // math.gcd(size, batch)
    steps = max(step, round(config.gradient_accumulation_steps / step) * step)
    fitting = [
        str(n) for n in range(2, config.global_batch_size + 1) if config.global_batch_size % n == 0
    ]
    ranks_that_fit = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    raise UserError(
        f"--batch_size {batch} x --gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} is a global batch of {config.global_batch_size} windows, "
        f"which {size} ranks cannot share equally: use {ranks_that_fit or '1'} ranks, or, unless "
        f"a run is to be gone on with, --gradient_accumulation_steps {steps}"
    )


def open_run_on_all_ranks(
    config: Config, dataset: Dataset, explicit: Collection[str], comm: Comm, *, requested: Config
) -> OpenedRun:
    """What rank 0 finds in the run folder, told to all, who have to have started alike.

    Args:
        config: settled, the same on all.
        corpus: what this rank reads.
        given: fields that were set by hand.
        ranks: who train together.
        asked: what this rank was started with.

    Raises:
        RunError: naming a rank with another text, tokenizer, configuration or version.
    """
    if env_int("TORCHELASTIC_RESTART_COUNT", 0):
        # A restart goes on with what the first start began.
        config = dataclasses.replace(config, restart=False)

    def look() -> dict[str, Any]:
        tokenizer, text = dataset.tokenizer, dataset.sha256
        return open_run(config, explicit=explicit, tokenizer=tokenizer, text_sha256=text).to_json()

    opening = OpenedRun.from_json(comm.broadcast_from_rank0(look))
    comm.assert_same(
        {
            **{f"--{name}": str(value) for name, value in vars(requested).items()},
            "choice of flags": " ".join(sorted(explicit)) or "none",
            "text (SHA-256)": dataset.sha256,
            "tokenizer": sha256(json.dumps(dataset.tokenizer.to_json()).encode()).hexdigest(),
            "version of gptforge": __version__,
            "version of torch": torch.__version__,
        }
    )
    return opening


def use_fsdp(
    config: Config, device: torch.device, precision: Precision, comm: Comm, log: Say
) -> bool:
    """Whether the model is to lie in pieces on the ranks; says why.

    Raises:
        UserError: if that is asked for and does not work.
    """
    if comm.world_size == 1:
        if config.parallel == "fsdp":
            raise UserError(
                "--parallel fsdp shares a model among several ranks: start them with torchrun "
                "--nproc_per_node=N, or leave it out"
            )
        return False
    c = config
    why = "as asked"
    shards = c.parallel == "fsdp"
    if c.parallel == "auto":
        needed = sum(estimate_memory(c, 1, precision, DEFAULT_KERNELS).values())
        free = usable_memory(device) if device.type == "cuda" else None
        shards = not comm.all_true(free is None or needed <= MAX_MEMORY_FRACTION * free)
        why = f"a whole one takes {needed / 1e9:.1f} GB" if shards else "the model fits on each"
    if shards and precision.needs_scaler:
        raise UserError(
            "--dtype float16 does not go with --parallel fsdp, whose shards know no loss scale: "
            "use --dtype bfloat16 or float32, or --parallel ddp"
        )
    if shards and c.optimizer == "muon":
        raise UserError(
            f"--optimizer muon needs whole matrices, and the model would lie in shards "
            f"({why}): use --optimizer adamw, or --parallel ddp if it fits on each"
        )
    kind = "fsdp, a piece of the model on each" if shards else "ddp, the whole model on each"
    log(f"parallel: {kind} of {comm.world_size} ranks; {why}")
    return shards
