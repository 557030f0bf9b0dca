"""The configuration of a run: a flat, frozen dataclass.

A field's docstring is also its `--help`. An empty string or 0 stands for the default that the
docstring names: neither TOML nor flags have a null.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gptforge.errors import UserError
from gptforge.printable import short_repr

MAX_TOKENS_PER_STEP = 2**28
"""2 GB of int64 ids per copy to the device."""
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
SEED_LIMIT = 2**63
"""Seeds are smaller; sums of seeds are taken modulo this."""

Value = bool | int | float | str


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of a model."""

    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    activation: str = "gelu_tanh"

    @property
    def gelu_approximate(self) -> str:
        """The `approximate` argument of torch's GELU."""
        return {"gelu_tanh": "tanh", "gelu": "none"}[self.activation]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a GPT-2."""

    preset: str = ""
    """Named configuration to start from; empty: on a CUDA GPU auto with an --input of your own and
    gpt2 without one, elsewhere shakespeare-cpu."""
    config: str = ""
    """TOML file with any of these fields; it overrides the preset, and flags override it."""

    input: str = ""
    """What to train on: a text file, a folder of them, or token shards; empty: input.txt in this
    folder, else Shakespeare's works (bundled:input.txt)."""
    encoding: str = "utf-8"
    """Encoding of the text, for instance latin-1."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet or CSV file, that holds the text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """Format of the files; auto: by their names."""
    split_by_name: bool = True
    """If a file name contains the word train, hold out files with val, valid, validation or dev in
    their names, and skip those with test; false: treat all files alike."""
    raw_bin: bool = False
    """Read .bin files as raw uint16 ids without a header, as nanoGPT writes them."""
    tokenizer: str = "gpt2"
    """gpt2, char, byte, bpe (a byte-level BPE learned from the training part of the text), or the
    path of a tokenizer.json saved by a run."""
    val_fraction: float = 0.1
    """Fraction of the text held out for validation; 0: none."""
    shuffle: bool = True
    """Permute the training sequences in each epoch; false: the order of the text."""
    random_offset: bool = False
    """Cut the text into sequences at a random offset in each epoch; helps on small texts."""
    context_length: int = 1024
    """Tokens in a training sequence; at most block_size."""

    block_size: int = 1024
    """Longest sequence that the model can read: rows of its position embedding."""
    vocab_size: int = 0
    """Rows of the token embedding, and ids that --tokenizer bpe learns; 0: the tokenizer's size
    rounded up to a multiple of 64."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual."""
    mlp_ratio: int = 4
    """Hidden width of the MLP, in multiples of n_embd."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Activation of the MLP: gelu_tanh as in GPT-2, or the exact gelu as in nanoGPT, slower on a
    GPU."""
    dropout: float = 0.0
    """Dropout probability in training."""
    dropout_ramp: float = 0.0
    """Raise dropout linearly from 0 during this first fraction of max_steps; 0: constant
    dropout."""

    batch_size: int = 32
    """Sequences in a micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in a step; times batch_size it is the global batch size."""
    max_steps: int = 500
    """Optimizer steps to make."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks and AdamW for everything else."""
    max_lr: float = 1e-3
    """Learning rate at the end of the warmup."""
    min_lr: float = 1e-4
    """Learning rate at the end of the decay."""
    warmup_steps: int = 100
    """Steps of linear learning rate warmup."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warmup: cosine or linear decay to min_lr; constant: max_lr; wsd: max_lr, then a
    decay at the end; if the run is extended, it resumes before the decay."""
    decay_fraction: float = 0.2
    """Last fraction of max_steps, in which wsd decays."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; it is multiplied by the learning rate."""
    embedding_weight_decay: float = -1.0
    """Weight decay of the embeddings; -1: weight_decay."""
    muon_lr: float = 0.0
    """Learning rate at the end of the warmup for the matrices that Muon trains; 0: max_lr."""
    muon_weight_decay: float = -1.0
    """Weight decay of the matrices that Muon trains; -1: weight_decay."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    grad_clip: float = 1.0
    """Maximum gradient norm; 0: no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is evaluated, saved and exported
    in their place; 0: no average."""
    token_noise: float = 0.0
    """Probability that a training input token is replaced by another token of its batch; targets
    are unchanged."""
    seed: int = 1337
    """Seed of initial weights, shuffling, dropout and samples."""
    init_from: str = ""
    """Run or checkpoint to take the initial weights from, or a model to import from Hugging Face or
    nanoGPT; empty: random weights."""

    teachers: int = 0
    """Number of models of the same shape, with seeds seed + 1, seed + 2, ..., to train first; the
    model then also learns from the mean of their probabilities."""
    teacher_steps: int = 0
    """Optimizer steps to make with each teacher; 0: max_steps."""
    distill_weight: float = 0.5
    """Weight of the teachers' probabilities in the loss; that of the text is 1 - distill_weight."""

    out_dir: str = ""
    """Run folder; empty: runs/<preset>, or runs/<text>-<preset> with --input."""
    restart: bool = False
    """Move an existing run folder to a backup and start from scratch."""
    log_every: int = 10
    """Steps between step lines; the first, and the last of max_steps, are always logged."""
    eval_every: int = 50
    """Steps between evaluations on the held-out text."""
    eval_tokens: int = 0
    """Held-out tokens per evaluation, rounded up to full sequences and spread evenly; 0: all."""
    save_every: int = 250
    """Steps between checkpoints; a new best one is saved at once."""
    keep_checkpoints: int = 1
    """Checkpoints to keep besides best and last: the N latest, and N early ones, at a tenth, a
    hundredth, ... of save_every steps, which show how the model wrote before it had learned."""
    sample_every: int = 100
    """Steps between samples; 0: only at the end."""
    time_limit: float = 0.0
    """Minutes from the start of the process after which to save and stop; 0: none."""
    patience: int = -1
    """Stop after this many evaluations without a better held-out loss; 0: never; -1: never with the
    presets gpt2* or if the text is repeated at most 4 times, else 5, or a fifth of all evaluations
    if that is more."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    """Compute dtype of matmuls; master weights and optimizer states stay float32. fp8: for training
    on GPUs like H100 and H200; warmup_steps and evaluation are in bfloat16."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile; auto: on CUDA only."""
    mlp_matmul: Literal["auto", "cublas", "quack"] = "auto"
    """No effect: always cuBLAS. Accepted because commands for version 0.1 may contain it."""
    activation_checkpointing: bool = False
    """Save only each block's input for the backward pass: less memory, a third slower."""
    loss_chunk: int = 0
    """Tokens to compute logits for at a time; fewer take less memory; 0: the fastest number."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: ddp replicates the model, fsdp shards it; auto: ddp if it fits."""
    deterministic: bool = False
    """Use deterministic GPU kernels: slower, bit-for-bit reproducible."""
    tracker: str = ""
    """Experiment trackers to send metrics to, separated by commas: tensorboard, wandb, trackio,
    mlflow; empty: none."""

    @property
    def global_batch_size(self) -> int:
        """Sequences per step, over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step, over all ranks."""
        return self.global_batch_size * self.context_length

    @property
    def early_steps(self) -> set[int]:
        """Steps before the first `save_every` whose checkpoints are saved and kept."""
        count = min(self.keep_checkpoints, len(str(self.save_every)))
        return {self.save_every // 10**n for n in range(1, count + 1)} - {0}

    @property
    def trackers(self) -> list[str]:
        """The names in `tracker`."""
        return [name.strip() for name in self.tracker.split(",") if name.strip()]

    @property
    def model(self) -> GPTConfig:
        """The architecture; vocab_size must be resolved already."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)})


FIELDS: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Config)}

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
METADATA_TABLE = "made_by"
"""Table of a run's config.toml with versions and the command; it is not configuration."""
RENAMED_FIELDS = {
    "products": "mlp_matmul",
    "stagger": "random_offset",
    "keep": "keep_checkpoints",
    "headerless": "raw_bin",
    "overwrite": "restart",
}
"""Old spelling -> name, accepted in flags and TOML files."""
FOREIGN_FIELDS = {
    "learning_rate": "max_lr",
    "lr": "max_lr",
    "max_iters": "max_steps",
    "epochs": "max_steps",
    "warmup_iters": "warmup_steps",
    "eval_interval": "eval_every",
    "output": "out_dir",
    "data": "input",
}
"""Names in nanoGPT and other programs -> the name to suggest."""
REMOVED_FIELDS = frozenset({"attention"})
"""Fields of earlier versions that did not change results: ignored in the files of their runs."""
FLAG_ONLY = frozenset({"restart", "config", "resume", "quiet", "verbose", "log_format"})
"""Apply to one start of the program, so a TOML file must not set them."""

TEXT_FIELDS = ("input", "encoding", "field", "kind", "split_by_name", "raw_bin")
"""Describe the text, apart from how it is split and tokenized."""
# Fields that may differ when a run resumes. Of batch_size and gradient_accumulation_steps, the
# product may not.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *("preset", "config", "out_dir", "restart", "time_limit", "device", "compile"),
        *TEXT_FIELDS,
        *("log_every", "eval_every", "save_every", "keep_checkpoints", "sample_every"),
        *("patience", "batch_size", "gradient_accumulation_steps", "max_steps"),
        *("mlp_matmul", "activation_checkpointing", "loss_chunk", "parallel", "tracker"),
    }
)


def merge(base: Config, values: Mapping[str, object], *, source: str) -> Config:
    """Override fields of `base`; errors name the `source` of the values.

    Raises:
        UserError: for an unknown name (with the closest known one) or a value of the wrong type.
    """
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in FIELDS:
            others = FOREIGN_FIELDS | RENAMED_FIELDS
            close = others.get(name) or next(iter(difflib.get_close_matches(name, FIELDS)), "")
            hint = f"; did you mean '{close}'?" if close else ""
            if isinstance(value, dict):
                hint = "; fields belong to no table"
            raise UserError(f"{source}: there is no field '{name}'{hint}")
        kind = FIELDS[name]
        if type(value) is int and value.bit_length() > 63:
            raise UserError(f"{source}: {name} must be below 2**63")
        if name == "compile" and isinstance(value, bool):
            value = "true" if value else "false"
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{source}: {name} takes {TYPE_NAMES[kind]}, not {short_repr(value)}")
        checked[name] = value
    return dataclasses.replace(base, **checked)


def resume_conflicts(old: Config, new: Config) -> list[str]:
    """Why a run started with `old` cannot resume with `new`: lines of 'field: old -> new'."""
    found = [
        f"{name}: {getattr(old, name)!r} -> {getattr(new, name)!r}"
        for name in FIELDS
        if name not in MAY_CHANGE_ON_RESUME and getattr(old, name) != getattr(new, name)
    ]
    old_size, new_size = old.global_batch_size, new.global_batch_size
    if old_size != new_size:
        found.append(f"batch_size x gradient_accumulation_steps: {old_size} -> {new_size}")
    return found
