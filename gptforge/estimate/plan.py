"""What `gptforge plan` computes; the field names are the keys of `--json`."""

from dataclasses import dataclass

MAX_USEFUL_EPOCHS = 4
"""Up to so many epochs a repeated text is about as good as new text (Muennighoff et al., "Scaling
data-constrained language models", 2023)."""
CHINCHILLA_TOKENS_PER_PARAM = 20
"""Compute-optimal training tokens per parameter (Hoffmann et al., "Training compute-optimal large
language models", 2022)."""


@dataclass(frozen=True)
class ModelPlan:
    """Shape and size of the model."""

    preset: str
    n_layer: int
    n_embd: int
    n_head: int
    block_size: int
    vocab_size: int
    parameters: int
    non_embedding_parameters: int


@dataclass(frozen=True)
class DatasetPlan:
    """The text to train on."""

    path: str
    characters: int  # 0 if unknown, as with shards of another program
    bytes: int
    tokenizer: str
    tokenizer_ids: int
    tokens: int
    held_out_tokens: int
    prepared_now: bool  # tokenized for this plan; training finds the result in the cache


@dataclass(frozen=True)
class StepPlan:
    """One training step."""

    sequences: int
    context_length: int
    tokens: int
    micro_batch: int
    requested_micro_batch: int


@dataclass(frozen=True)
class RunPlan:
    """All training steps."""

    steps: int
    tokens: int
    epochs: float
    tokens_per_parameter: float


@dataclass(frozen=True)
class FlopsPlan:
    """FLOPs by `formulas.flops_per_token`."""

    per_token: int
    per_step: int
    run: int
    formula: str = "6 N + 12 L C T"


@dataclass(frozen=True)
class MemoryPlan:
    """Upper estimate of the memory that training takes."""

    device: str
    needed_bytes: int
    parts: dict[str, int]
    free_bytes: int | None  # if known
    fits: bool


@dataclass(frozen=True)
class DiskPlan:
    """Checkpoints: the most that are kept, and one that is being written."""

    out_dir: str
    checkpoint_bytes: int
    checkpoints: int
    needed_bytes: int
    free_bytes: int
    fits: bool


@dataclass(frozen=True)
class TimePlan:
    """Time of the training steps alone; None if it was not measured."""

    seconds: float | None
    seconds_per_step: float | None
    tokens_per_second: float | None
    how: str


@dataclass(frozen=True)
class TrainingPlan:
    """The size and cost of a training run, and whether it fits."""

    ok: bool  # fits into memory and on the disk
    model: ModelPlan
    text: DatasetPlan
    step: StepPlan
    run: RunPlan
    flops: FlopsPlan
    memory: MemoryPlan
    disk: DiskPlan
    time: TimePlan
    warnings: tuple[str, ...]
