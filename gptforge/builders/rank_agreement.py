"""What all ranks have to agree on before they build: batch sizes, sharding and the run folder."""

import dataclasses
import json
import logging
import math
from collections.abc import Collection
from hashlib import sha256
from typing import Any

import torch

from gptforge import __version__
from gptforge.checkpoint.run_dir import OpenedRun, open_run
from gptforge.config import Config
from gptforge.data.dataset import Dataset
from gptforge.device import Precision, usable_memory
from gptforge.distributed import Comm
from gptforge.errors import UserError
from gptforge.estimate.formulas import training_memory
from gptforge.shell import env_int
from gptforge.train.micro_batch_search import MAX_MEMORY_FRACTION

logger = logging.getLogger(__name__)


def check_global_batch(config: Config, comm: Comm) -> None:
    """Raise a UserError unless the global batch divides evenly over the ranks."""
    global_batch, ranks = config.global_batch_size, comm.world_size
    if global_batch % ranks == 0:
        return
    accumulation = config.gradient_accumulation_steps
    unit = ranks // math.gcd(ranks, config.batch_size)
    suggested = max(unit, round(accumulation / unit) * unit)
    divisors = [str(n) for n in range(2, global_batch + 1) if global_batch % n == 0]
    possible_ranks = ", ".join(divisors[:8]) + (", ..." if len(divisors) > 8 else "")
    raise UserError(
        f"--batch_size {config.batch_size} x --gradient_accumulation_steps {accumulation} is a "
        f"global batch of {global_batch} sequences, which does not divide by {ranks} ranks: use "
        f"{possible_ranks or '1'} ranks, or, unless you resume a run, "
        f"--gradient_accumulation_steps {suggested}"
    )


def open_run_on_all_ranks(
    config: Config, dataset: Dataset, explicit: Collection[str], comm: Comm, *, requested: Config
) -> OpenedRun:
    """Open the run folder on rank 0, and broadcast what is there.

    Raises:
        RunError: naming a rank with another text, tokenizer, `requested` configuration or version.
    """
    if env_int("TORCHELASTIC_RESTART_COUNT", 0):
        # A restarted worker resumes what the first start began.
        config = dataclasses.replace(config, restart=False)

    def open_on_main() -> dict[str, Any]:
        opened = open_run(
            config,
            explicit=explicit,
            tokenizer=dataset.tokenizer,
            text_sha256=dataset.sha256,
        )
        return opened.to_json()

    opened = OpenedRun.from_json(comm.broadcast_from_rank0(open_on_main))
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
    return opened


def use_fsdp(config: Config, device: torch.device, precision: Precision, comm: Comm) -> bool:
    """Whether to shard the model over the ranks (FSDP) instead of replicating it (DDP).

    Raises:
        UserError: if sharding is requested or needed, and does not work with another flag.
    """
    if comm.world_size == 1:
        if config.parallel == "fsdp":
            raise UserError(
                "--parallel fsdp shards a model over several ranks: start them with torchrun "
                "--nproc_per_node=N, or leave it out"
            )
        return False
    reason = "as requested"
    is_sharded = config.parallel == "fsdp"
    if config.parallel == "auto" and not config.teachers:
        memory = training_memory(config, 1, mixed_precision=precision.is_mixed)
        needed = sum(memory.values())
        free = usable_memory(device) if device.type == "cuda" else None
        is_sharded = not comm.all_true(free is None or needed <= MAX_MEMORY_FRACTION * free)
        reason = "the model fits on each"
        if is_sharded:
            reason = f"a full copy takes {needed / 1e9:.1f} GB"
    if is_sharded and precision.needs_scaler:
        raise UserError(
            "--dtype float16 does not work with --parallel fsdp, which has no loss scaling: "
            "use --dtype bfloat16 or float32, or --parallel ddp"
        )
    if is_sharded and precision.float8:
        raise UserError(
            f"--dtype fp8 needs unsharded matrices, and the model would be sharded ({reason}): use "
            "--dtype bfloat16, or --parallel ddp if it fits on each rank"
        )
    if is_sharded and config.optimizer == "muon":
        raise UserError(
            f"--optimizer muon needs unsharded matrices, and the model would be sharded "
            f"({reason}): use --optimizer adamw, or --parallel ddp if it fits on each rank"
        )
    kind = "fsdp, the model sharded over" if is_sharded else "ddp, a copy of the model on each of"
    logger.info(f"parallel: {kind} {comm.world_size} ranks; {reason}")
    return is_sharded
