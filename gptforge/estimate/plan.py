"""The figures of a plan."""

from dataclasses import dataclass

MAX_USEFUL_EPOCHS = 4
"""Times that a text is read about as well as so much new text: Muennighoff et al., "Scaling
data-constrained language models", 2023."""
CHINCHILLA_TOKENS_PER_PARAM = 20
"""To be learned from for the lowest loss by so many FLOPs: Hoffmann et al., "Training
compute-optimal large language models", 2022."""


@dataclass(frozen=True)
class ModelPlan:
    """Its shape."""

    preset: str
    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    vocab_size: int
    parameters: int
    non_embedding_parameters: int
    """Neither tokens nor positions."""


@dataclass(frozen=True)
class DatasetPlan:
    """What is learned from."""

    path: str
    characters: int
    """0 where that is not known, as with another program's shards."""
    bytes: int
    tokenizer: str
    tokenizer_ids: int
    tokens: int
    held_out_tokens: int
    prepared_now: bool
    """Whether it had to be turned into tokens, which are kept for the training."""


@dataclass(frozen=True)
class StepPlan:
    """One update."""

    sequences: int
    context_length: int
    tokens: int
    micro_batch: int
    requested_micro_batch: int


@dataclass(frozen=True)
class RunPlan:
    """All updates."""

    steps: int
    tokens: int
    epochs: float
    tokens_per_parameter: float


@dataclass(frozen=True)
class FlopsPlan:
    """By the convention of `costs.flops_per_token`."""

    per_token: int
    per_step: int
    run: int
    formula: str = "6 N + 12 L C T"
    """A token; N parameters, L layers, C wide, windows of T."""


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate from above, with the micro-batch of `Step`."""

    device: str
    needed_bytes: int
    parts: dict[str, int]
    free_bytes: int | None
    """None where it is not known."""
    fits: bool


@dataclass(frozen=True)
class DiskPlan:
    """Checkpoints at their most: those that stay, and one that is being written."""

    out_dir: str
    checkpoint_bytes: int
    checkpoints: int
    needed_bytes: int
    free_bytes: int
    fits: bool
    steps_saved: int
    """Of a run that lies there already."""


@dataclass(frozen=True)
class TimePlan:
    """Updates alone; None where they were not measured."""

    seconds: float | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    how: str


@dataclass(frozen=True)
class TrainingPlan:
    """Everything, with what was said on the way and what should be thought over."""

    ok: bool
    """Whether it fits into memory and onto the disk."""
    model: ModelPlan
    text: DatasetPlan
    step: StepPlan
    run: RunPlan
    flops: FlopsPlan
    memory: MemoryPlan
    disk: DiskPlan
    time: TimePlan
    warnings: tuple[str, ...]
