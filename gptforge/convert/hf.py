"""To and from transformers' GPT2LMHeadModel: a folder of safetensors, JSON and a model card."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptforge import costs
from gptforge.checkpoint.store import MORE_BYTES
from gptforge.checkpoint.tensors import write_tensors
from gptforge.config import GPTConfig
from gptforge.convert.extras import require
from gptforge.convert.hf_tokenizer import OURS, hf_tokenizer, read_hf_tokenizer
from gptforge.convert.parts import TIED, Parts, fitted, probe, size_in, with_end_of_text
from gptforge.convert.torch_file import check_tensors, read_torch_file
from gptforge.errors import RunError, UserError, parsing
from gptforge.files import read_small, require_bounded
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import save as save_tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

LARGEST_DIFFERENCE = 1e-4
"""Of logits, in float32: what another order of additions explains, and nothing else."""

PREFIX = "transformer."
"""In front of our names and of those that transformers saves. OpenAI's own files have none: every
program reads those, some read no others."""
# But for that, their names are ours. These are stored (in, out) there, (out, in) here.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old checkpoints carry as if they were weights."""

WEIGHTS, OLDER_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
OTHER_FILES = (
    *("config.json", "tokenizer.json", "gptforge*.json"),
    *("merges.txt", "vocab.json", "added_tokens.json"),
)
"""What is read of a folder beside its weights."""

# What the architecture fixes: setting in config.json, values that mean GPT-2 as it is here.
FIXED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# Ours to theirs, the name to write first: the tanh form of GELU, and the exact one.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu": ("gelu", "gelu_python"),
}


def write_hf(folder: Path, parts: Parts, *, card: str) -> float:
    """Fill an empty folder; returns the largest difference of its logits to ours.

    Raises:
        RunError: if transformers reads another model or tokenizer out of it than was put in.
    """
    require("transformers", extra="hf")
    parts, end = with_end_of_text(parts)
    tensors = {
        name.removeprefix(PREFIX): _turned(name, tensor) for name, tensor in parts.tensors.items()
    }
    write_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(parts.config, end))
    draws = {"do_sample": True, "temperature": 0.8, "top_k": min(200, parts.tokenizer.size)}
    _write_json(folder / "generation_config.json", {**draws, **_special_ids(end)})
    _write_json(folder / "tokenizer.json", hf_tokenizer(parts.tokenizer, end))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": parts.config.block_size,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk", "pad")},
        },
    )
    save_tokenizer(parts.tokenizer, folder / OURS)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return _check(folder, parts, end)


def is_hf(folder: Path) -> bool:
    """Whether a folder has the form that transformers saves."""
    return (folder / "config.json").is_file()


def files_of_a_model(folder: Path) -> list[Path]:
    """All that `read_hf` may read of a folder."""
    return sorted({*_weights(folder), *(p for name in OTHER_FILES for p in folder.glob(name))})


def read_hf(folder: Path, *, tokenizer: Tokenizer | None = None) -> Parts:
    """A GPT-2 that transformers, or `write_hf`, saved.

    Raises:
        UserError: if it is no GPT-2, or a tensor is missing or misshapen; the message names it.
    """
    where = folder.as_posix()
    with parsing(f"{where}/config.json", "a GPT-2's configuration"):
        facts = json.loads(read_small(folder / "config.json"))
        for name, allowed in FIXED.items():
            if facts.get(name, allowed[0]) not in allowed:
                given = short_repr(facts[name])
                raise ValueError(f"{name} is {given}, GPT-2's is {allowed[0]!r}")
        named = facts.get("activation_function", "gelu_new")
        activation = next((ours for ours, names in ACTIVATIONS.items() if named in names), None)
        if activation is None:
            known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
            given = short_repr(named)
            raise ValueError(f"activation_function is {given}: GPT-2's is one of {known}")
        width, inner = size_in(facts, "n_embd"), 0
        if facts.get("n_inner") is not None and (inner := size_in(facts, "n_inner")) % width:
            raise ValueError(f"n_inner {inner} is not a multiple of n_embd {width}")
        config = GPTConfig(
            block_size=size_in({"n_positions": facts.get("n_ctx", 1024), **facts}, "n_positions"),
            vocab_size=size_in(facts, "vocab_size"),
            n_layer=size_in(facts, "n_layer"),
            n_head=size_in(facts, "n_head"),
            n_embd=width,
            mlp_ratio=inner // width if inner else 4,
            activation=activation,
        )
    _require_size(folder, config)
    found = {}
    for name, tensor in _tensors(folder, config).items():
        name = name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name
        if not name.endswith(MASKS):
            found[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.ndim == 2 else tensor
    tensors = fitted(found, config, source=where)
    tokenizer = tokenizer or read_hf_tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.size} ids, the model {config.vocab_size} rows"
        )
    if not (folder / OURS).is_file() and tokenizer.end_of_text is not None:
        # OpenAI's models were trained on documents with this mark between them.
        tokenizer = copy.copy(tokenizer)
        tokenizer.marks_documents = facts.get("bos_token_id") == tokenizer.end_of_text
    return Parts(config, tensors, tokenizer)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()


def _special_ids(end: int) -> dict[str, int]:
    return {f"{name}_token_id": end for name in ("bos", "eos", "pad")}


def _config(config: GPTConfig, end: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in FIXED.items()},
        "activation_function": ACTIVATIONS[config.activation][0],
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None if config.mlp_ratio == 4 else config.mlp_ratio * config.n_embd,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        **_special_ids(end),
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _tensors(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or several."""
    # Float64 weights, an output layer of its own, and the causal masks that old ones have.
    masks = config.n_layer * config.block_size**2
    most = 8 * (2 * costs.parameters(config) + masks) + MORE_BYTES
    paths = _weights(folder)
    if not paths:
        raise UserError(
            f"{folder.as_posix()} has neither model.safetensors nor pytorch_model.bin; other forms "
            "of weights are not read"
        )
    found: dict[str, Tensor] = {}
    for path in paths:
        is_safetensors = path.suffix == ".safetensors"
        what = "a readable safetensors file" if is_safetensors else "weights of transformers'"
        with parsing(path, what):
            require_bounded(path, most)
            found |= load_file(path) if is_safetensors else _pickled(path)
    return found


def _weights(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; the older form only where the newer is missing."""
    return sorted(folder.glob(WEIGHTS)) or sorted(folder.glob(OLDER_WEIGHTS))


def _pickled(path: Path) -> dict[str, Tensor]:
    tensors = read_torch_file(path, what="weights of transformers'")
    if not isinstance(tensors, Mapping):
        raise ValueError("no names with tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{short_repr(name)} is no tensor")
    check_tensors(path, {name: tensor for name, tensor in tensors.items() if name != TIED})
    return dict(tensors)


def _require_size(folder: Path, config: GPTConfig) -> None:
    """A few bytes of a stranger's config.json must not make anybody build a terabyte."""
    present = sum(path.stat().st_size for path in _weights(folder))
    if present and 2 * costs.parameters(config) > present:
        raise UserError(
            f"{folder.as_posix()}/config.json describes {costs.parameters(config):,} parameters, "
            f"but its weights have {present:,} bytes"
        )


@torch.inference_mode()
def _check(folder: Path, parts: Parts, end: int) -> float:
    """Read the folder as transformers does, and compare."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # The mark between documents is no text: ours reads one in a text letter by letter.
    count = min(64, parts.config.block_size, parts.tokenizer.size)
    ids = [i for i in range(count) if i != parts.tokenizer.end_of_text]
    text = parts.tokenizer.decode_bytes(ids).decode("utf-8", "ignore")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = theirs.encode(text, add_special_tokens=False)
    if ids != parts.tokenizer.encode(text).tolist() or theirs.eos_token_id != end:
        raise RunError("transformers reads another tokenizer out of the export: it was not kept")
    peer = transformers.GPT2LMHeadModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()
    rows = probe(parts.config, parts.config.vocab_size)
    difference = float((peer(rows).logits - parts.model()(rows)).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise RunError(
            f"the exported model's logits differ by {difference:.2e}, more than "
            f"{LARGEST_DIFFERENCE:.0e}: the export was not kept"
        )
    return difference


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
