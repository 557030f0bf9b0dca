"""What several ranks have to agree on before they build: shares, shards, and the run folder."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from hashlib import sha256
from typing import Any

import torch

from gptforge import __version__
from gptforge.build.fitting import memory_of
from gptforge.checkpoint.run_folder import Opening, open_run
from gptforge.config import Config
from gptforge.data.corpus import Corpus
from gptforge.distributed import Ranks
from gptforge.errors import UserError
from gptforge.hardware import PLAIN, Precision, usable_memory
from gptforge.launch_env import env_int
from gptforge.train.micro_batch import HEADROOM

Say = Callable[[str], None]


def check_shares(config: Config, ranks: Ranks) -> None:
    """Raise a UserError unless every rank gets as many windows of a global batch."""
    if config.global_batch % ranks.size == 0:
        return
    size, batch = ranks.size, config.batch_size
    step = size // math.gcd(size, batch)
    steps = max(step, round(config.gradient_accumulation_steps / step) * step)
    fitting = [str(n) for n in range(2, config.global_batch + 1) if config.global_batch % n == 0]
    ranks_that_fit = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    raise UserError(
        f"--batch_size {batch} x --gradient_accumulation_steps "
        f"{config.gradient_accumulation_steps} is a global batch of {config.global_batch} windows, "
        f"which {size} ranks cannot share equally: use {ranks_that_fit or '1'} ranks, or, unless "
        f"a run is to be gone on with, --gradient_accumulation_steps {steps}"
    )


def open_together(
    config: Config, corpus: Corpus, given: Collection[str], ranks: Ranks, *, asked: Config
) -> Opening:
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
        config = dataclasses.replace(config, overwrite=False)

    def look() -> dict[str, Any]:
        tokenizer, text = corpus.tokenizer, corpus.sha256
        return open_run(config, given=given, tokenizer=tokenizer, text_sha256=text).to_json()

    opening = Opening.from_json(ranks.on_first(look))
    ranks.require_same(
        {
            **{f"--{name}": str(value) for name, value in vars(asked).items()},
            "choice of flags": " ".join(sorted(given)) or "none",
            "text (SHA-256)": corpus.sha256,
            "tokenizer": sha256(json.dumps(corpus.tokenizer.to_json()).encode()).hexdigest(),
            "version of gptforge": __version__,
            "version of torch": torch.__version__,
        }
    )
    return opening


def wants_shards(
    config: Config, device: torch.device, precision: Precision, ranks: Ranks, say: Say
) -> bool:
    """Whether the model is to lie in pieces on the ranks; says why.

    Raises:
        UserError: if that is asked for and does not work.
    """
    if ranks.size == 1:
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
        needed = sum(memory_of(c, 1, precision, PLAIN).values())
        free = usable_memory(device) if device.type == "cuda" else None
        shards = not ranks.all_of(free is None or needed <= HEADROOM * free)
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
    say(f"parallel: {kind} of {ranks.size} ranks; {why}")
    return shards
