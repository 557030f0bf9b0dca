"""What a run is: one flat, frozen dataclass, its TOML form, and the checks before building.

A field's docstring is also its `--help`. An empty string or a 0 means "choose for me" where the
docstring says so: TOML has no null, and neither have flags.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptforge.errors import UserError, parsing
from gptforge.files import read_text
from gptforge.printable import short_repr

MAX_TOKENS_PER_STEP = 2**28
"""Tokens in a step: as many take 2 GB on their way to the device."""
SEED_LIMIT = 2**63
"""Seeds are below it; where one is added to, the sum wraps around here."""

Value = bool | int | float | str


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model, and nothing else."""

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
        """As torch's `approximate` has it: tanh or none."""
        return {"gelu_tanh": "tanh", "gelu": "none"}[self.activation]


@dataclass(frozen=True)
class Config:
    """Train a GPT-2."""

    preset: str = ""
    """Named starting point; empty: gpt2 on a CUDA GPU, shakespeare-cpu elsewhere."""
    config: str = ""
    """TOML file with any of these fields; flags win over it, it wins over the preset."""

    input: str = ""
    """What to learn: a file of text, a folder of them, or token shards; empty: input.txt in this
    folder, else Shakespeare's works (bundled:input.txt)."""
    encoding: str = "utf-8"
    """Of the text, for instance latin-1."""
    field: str = "text"
    """Field of a JSON line, or column of a Parquet or CSV file, that holds the text."""
    kind: Literal["auto", "text", "jsonl", "parquet", "csv"] = "auto"
    """What the files hold; auto goes by their names."""
    split_by_name: bool = True
    """Hold out files whose names say val, valid, validation or dev, and leave out test, if others
    say train; false: take them like all others."""
    raw_bin: bool = False
    """Take .bin files for bare uint16 ids, as nanoGPT writes them."""
    tokenizer: str = "gpt2"
    """gpt2, char, byte, or the path of a tokenizer.json saved by a run."""
    val_fraction: float = 0.1
    """Share of the text held out to judge the model by; 0: none."""
    shuffle: bool = True
    """Permute the windows in each epoch; false: the order of the text."""
    random_offset: bool = False
    """Cut the text into windows at other places in each epoch: more to learn from a small one."""
    context_length: int = 1024
    """Tokens in a training window; at most block_size."""

    block_size: int = 1024
    """Longest sequence the model can read: rows of its position table."""
    vocab_size: int = 0
    """Rows of the token table; 0: the tokenizer's size rounded up to a multiple of 64."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    mlp_ratio: int = 4
    """Width of the feed-forward layer, in multiples of n_embd."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """Of the feed-forward layer: gelu_tanh, GPT-2's, or gelu, by the error function, nanoGPT's,
    which trains more slowly on a GPU."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""

    batch_size: int = 32
    """Windows in a micro-batch."""
    gradient_accumulation_steps: int = 4
    """Micro-batches in an update; times batch_size it is the global batch."""
    max_steps: int = 500
    """Updates to make."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """How gradients become updates; muon: the blocks' matrices by Muon, the rest by AdamW."""
    max_lr: float = 1e-3
    """Learning rate at the end of the warmup."""
    min_lr: float = 1e-4
    """Learning rate the cosine decays to."""
    warmup_steps: int = 100
    """Updates over which the learning rate rises in a line."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings, a share of the learning rate."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.95
    """AdamW's second moment decay."""
    grad_clip: float = 1.0
    """Longest gradient norm let through; 0: no clipping."""
    seed: int = 1337
    """Seed of the weights, the order of the windows, dropout and samples."""
    init_from: str = ""
    """Run or checkpoint whose weights to start from, or another program's model, which is imported
    into runs/imported; empty: random weights."""

    out_dir: str = ""
    """Run folder; empty: runs/<preset>."""
    restart: bool = False
    """Move an existing run folder aside and start anew."""
    log_every: int = 10
    """Updates between step lines; the first and last are always logged."""
    eval_every: int = 50
    """Updates between evaluations on the held-out text."""
    eval_tokens: int = 0
    """Held-out tokens an evaluation reads, spread evenly; 0: all of them."""
    save_every: int = 250
    """Updates between scheduled checkpoints; a new best is saved when it is found."""
    keep_checkpoints: int = 1
    """Checkpoints to keep besides best and last."""
    sample_every: int = 100
    """Updates between samples; 0: only at the end."""
    time_limit: float = 0.0
    """Minutes from the start of the process after which to save and stop; 0: none."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of matrix products; weights and optimizer stay float32."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile; auto: on CUDA only."""
    mlp_matmul: Literal["auto", "cublas", "quack"] = "auto"
    """Who makes the MLP's; quack: a package, faster, slow to start; auto: on long runs."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass: less memory, a third slower."""
    loss_chunk: int = 0
    """Tokens whose logits are made at a time; fewer take less memory; 0: as many as is fast."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun: ddp has the whole model on each rank, fsdp a piece; auto: ddp if it fits."""
    deterministic: bool = False
    """Use deterministic GPU kernels: slower, repeatable bit for bit."""

    @property
    def global_batch_size(self) -> int:
        """Windows that one update sees."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one update learns from."""
        return self.global_batch_size * self.context_length

    @property
    def model(self) -> GPTConfig:
        """The model's part; vocab_size must have been settled."""
        names = [field.name for field in dataclasses.fields(GPTConfig)]
        return GPTConfig(**{name: getattr(self, name) for name in names})


FIELDS: dict[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Config)}

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
METADATA_TABLE = "made_by"
"""The table of a run's config.toml that says how it was made; reading passes over it."""
REMOVED_FIELDS = frozenset({"attention"})
"""Fields of earlier versions, which changed nothing of what is learned; their runs can go on."""
FLAG_ONLY = frozenset({"restart", "config"})
"""What is meant for one start, not for every start from that file."""

# What may differ when a run goes on, since it does not change what is learned. batch_size and
# gradient_accumulation_steps are compared by their product.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        *("preset", "config", "input", "out_dir", "restart", "time_limit", "device", "compile"),
        *("encoding", "raw_bin", "field", "kind", "split_by_name"),
        *("log_every", "eval_every", "save_every", "keep_checkpoints", "sample_every"),
        *("batch_size", "gradient_accumulation_steps", "max_steps"),
        *("mlp_matmul", "activation_checkpointing", "loss_chunk", "parallel"),
    }
)


def merge(base: Config, values: Mapping[str, object], *, source: str) -> Config:
    """Config `base` with `values` laid over it; `source` names where they came from in errors.

    Raises:
        UserError: for an unknown name (with the nearest known one) or a value of the wrong type.
    """
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            if isinstance(value, dict):
                hint = "; fields stand by themselves, in no table"
            raise UserError(f"{source}: there is no field '{name}'{hint}")
        kind = FIELDS[name]
        if type(value) is int and value.bit_length() > 63:
            raise UserError(f"{source}: {name} must be below 2**63")
        if name == "compile" and isinstance(value, bool):
            value = "true" if value else "false"
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            given = f"{short_repr(value)} ({type(value).__name__})"
            raise UserError(f"{source}: {name} takes {TYPE_NAMES[kind]}, not {given}")
        checked[name] = value
    return dataclasses.replace(base, **checked)


def read_toml(path: Path) -> tuple[dict[str, object], bool]:
    """The fields that a TOML file sets, and whether a run wrote it: then none was set by hand."""
    with parsing(f"--config {path}", "a readable TOML file"):
        values = tomllib.loads(read_text(path))
    is_a_runs = isinstance(values.pop(METADATA_TABLE, None), dict)
    if is_a_runs:
        values = {name: value for name, value in values.items() if name not in REMOVED_FIELDS}
        if "split_by_name" not in values:
            # Runs of versions before 0.2 read CSV as prose, and mixed all files.
            is_table = Path(str(values.get("input"))).suffix.lower() in (".csv", ".tsv")
            values |= {"split_by_name": False, "kind": "text" if is_table else "auto"}
    for name in sorted(FLAG_ONLY & values.keys()):
        if values.pop(name):
            raise UserError(f"--config {path}: {name} can only be given as a flag")
    return values, is_a_runs


def to_toml(config: Config, metadata: Mapping[str, str]) -> str:
    """Every field as TOML, with `notes` (versions, command) in a table that reading passes over."""
    kept = [name for name in FIELDS if name not in FLAG_ONLY]
    lines = [f"{name} = {_toml_value(getattr(config, name))}" for name in kept]
    lines += ["", f"[{METADATA_TABLE}]"] + [
        f"{name} = {_toml_value(text)}" for name, text in metadata.items()
    ]
    return "\n".join(lines) + "\n"


def _toml_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's strings are TOML's basic strings, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def resume_conflicts(old: Config, new: Config) -> list[str]:
    """What keeps `new` from going on with a run made with `old`: 'field: old -> new', in words."""
    found = [
        f"{name}: {getattr(old, name)!r} -> {getattr(new, name)!r}"
        for name in FIELDS
        if name not in MAY_CHANGE_ON_RESUME and getattr(old, name) != getattr(new, name)
    ]
    if old.global_batch_size != new.global_batch_size:
        found.append(
            f"batch_size x accumulation: {old.global_batch_size} -> {new.global_batch_size}"
        )
    if new.max_steps < old.max_steps:
        found.append(f"max_steps: {old.max_steps} -> {new.max_steps} (it may only be raised)")
    return found


def validate(config: Config) -> None:
    """Raise a UserError that names the flag and the values, for the first number that is wrong."""
    c = config
    for name, hint in typing.get_type_hints(Config).items():
        value = getattr(c, name)
        if isinstance(value, str) and not value.isprintable() and not _is_text(value):
            raise UserError(f"--{name} {value!r} is not valid UTF-8 text: use another name")
        choices = typing.get_args(hint)
        if choices and value not in choices:
            raise UserError(f"--{name} {value}: give one of {', '.join(choices)}")
        if isinstance(value, int) and value.bit_length() > 63:
            raise UserError(f"--{name} must be below 2**63")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, not {value}")
    _at_least(c, 1, "block_size n_layer n_head n_embd mlp_ratio context_length batch_size")
    _at_least(c, 1, "gradient_accumulation_steps max_steps log_every eval_every save_every")
    _at_least(
        c, 0, "vocab_size warmup_steps eval_tokens keep_checkpoints sample_every time_limit seed"
    )
    _at_least(c, 0, "weight_decay grad_clip min_lr loss_chunk")
    _below_one(c, "val_fraction dropout beta1 beta2")
    if c.tokens_per_step > MAX_TOKENS_PER_STEP:
        raise UserError(
            f"--batch_size {c.batch_size} x --gradient_accumulation_steps "
            f"{c.gradient_accumulation_steps} x --context_length {c.context_length} is "
            f"{c.tokens_per_step:,} tokens a step; at most {MAX_TOKENS_PER_STEP:,} can be held"
        )
    if c.seed >= SEED_LIMIT:
        raise UserError(f"--seed must be below 2**63, not {c.seed}")
    if c.n_embd % c.n_head:
        raise UserError(
            f"--n_embd {c.n_embd} is not a multiple of --n_head {c.n_head}: "
            f"each head takes n_embd / n_head channels"
        )
    if c.context_length > c.block_size:
        raise UserError(
            f"--context_length {c.context_length} is more than --block_size {c.block_size}: "
            "the model has no positions for it"
        )
    if c.max_lr <= 0:
        raise UserError(f"--max_lr must be above 0, not {c.max_lr}")
    if c.min_lr > c.max_lr:
        raise UserError(f"--min_lr {c.min_lr} is more than --max_lr {c.max_lr}")
    if c.warmup_steps > c.max_steps:
        raise UserError(
            f"--warmup_steps {c.warmup_steps} is more than --max_steps {c.max_steps}: "
            "the learning rate would never reach --max_lr"
        )


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _at_least(config: Config, low: int, names: str) -> None:
    for name in names.split():
        if getattr(config, name) < low:
            raise UserError(f"--{name} must be {low} or more, not {getattr(config, name)}")


def _below_one(config: Config, names: str) -> None:
    for name in names.split():
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} must be from 0 to below 1, not {getattr(config, name)}")
