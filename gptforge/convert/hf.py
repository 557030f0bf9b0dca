"""To and from transformers' GPT2LMHeadModel: a folder of safetensors, JSON and a model card."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptforge.checkpoint.state_dict import save_safetensors
from gptforge.checkpoint.store import MAX_EXTRA_BYTES
from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    LM_HEAD,
    ModelBundle,
    probe_ids,
    read_size,
    validate_state_dict,
    with_eos_token,
)
from gptforge.convert.hf_tokenizer import NATIVE_TOKENIZER, load_hf_tokenizer, tokenizer_json
from gptforge.convert.torch_file import check_tensors, read_torch_file
from gptforge.errors import RunError, UserError, parsing, require_package
from gptforge.estimate import formulas
from gptforge.files import check_file_size, read_text
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import save as save_tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

MAX_LOGIT_DIFFERENCE = 1e-4
"""Of logits, in float32: what another order of additions explains, and nothing else."""

PREFIX = "transformer."
"""In front of our names and of those that transformers saves. OpenAI's own files have none: every
program reads those, some read no others."""
# But for that, their names are ours. These are stored (in, out) there, (out, in) here.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
"""Causal masks that old checkpoints carry as if they were weights."""

SAFETENSORS_WEIGHTS, PYTORCH_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
OTHER_FILES = (
    *("config.json", "tokenizer.json", "gptforge*.json"),
    *("merges.txt", "vocab.json", "added_tokens.json"),
)
"""What is read of a folder beside its weights."""

# What the architecture fixes: setting in config.json, values that mean GPT-2 as it is here.
FIXED_CONFIG: Mapping[str, tuple[object, ...]] = {
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


def write_hf(folder: Path, bundle: ModelBundle, *, card: str) -> float:
    """Fill an empty folder; returns the largest difference of its logits to ours.

    Raises:
        RunError: if transformers reads another model or tokenizer out of it than was put in.
    """
    require_package("transformers", extra="hf")
    bundle, end = with_eos_token(bundle)
    tensors = {
        name.removeprefix(PREFIX): _turned(name, tensor)
        for name, tensor in bundle.state_dict.items()
    }
    save_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(bundle.config, end))
    draws = {"do_sample": True, "temperature": 0.8, "top_k": min(200, bundle.tokenizer.vocab_size)}
    _write_json(folder / "generation_config.json", {**draws, **_special_ids(end)})
    _write_json(folder / "tokenizer.json", tokenizer_json(bundle.tokenizer, end))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": bundle.config.block_size,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk", "pad")},
        },
    )
    save_tokenizer(bundle.tokenizer, folder / NATIVE_TOKENIZER)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return _check(folder, bundle, end)


def is_hf_dir(folder: Path) -> bool:
    """Whether a folder has the form that transformers saves."""
    return (folder / "config.json").is_file()


def model_files(folder: Path) -> list[Path]:
    """All that `read_hf` may read of a folder."""
    return sorted({*_weights(folder), *(p for name in OTHER_FILES for p in folder.glob(name))})


def read_hf(folder: Path, *, tokenizer: Tokenizer | None = None) -> ModelBundle:
    """A GPT-2 that transformers, or `write_hf`, saved.

    Raises:
        UserError: if it is no GPT-2, or a tensor is missing or misshapen; the message names it.
    """
    where = folder.as_posix()
    with parsing(f"{where}/config.json", "a GPT-2's configuration"):
        facts = json.loads(read_text(folder / "config.json"))
        for name, allowed in FIXED_CONFIG.items():
            if facts.get(name, allowed[0]) not in allowed:
                given = short_repr(facts[name])
                raise ValueError(f"{name} is {given}, GPT-2's is {allowed[0]!r}")
        named = facts.get("activation_function", "gelu_new")
        activation = next((ours for ours, names in ACTIVATIONS.items() if named in names), None)
        if activation is None:
            known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
            given = short_repr(named)
            raise ValueError(f"activation_function is {given}: GPT-2's is one of {known}")
        width, inner = read_size(facts, "n_embd"), 0
        if facts.get("n_inner") is not None and (inner := read_size(facts, "n_inner")) % width:
            raise ValueError(f"n_inner {inner} is not a multiple of n_embd {width}")
        config = GPTConfig(
            block_size=read_size({"n_positions": facts.get("n_ctx", 1024), **facts}, "n_positions"),
            vocab_size=read_size(facts, "vocab_size"),
            n_layer=read_size(facts, "n_layer"),
            n_head=read_size(facts, "n_head"),
            n_embd=width,
            mlp_ratio=inner // width if inner else 4,
            activation=activation,
        )
    _require_size(folder, config)
    found = {}
    for name, tensor in _tensors(folder, config).items():
        name = name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name
        if not name.endswith(CAUSAL_MASK_BUFFERS):
            found[name] = tensor.t() if name.endswith(TRANSPOSED) and tensor.ndim == 2 else tensor
    tensors = validate_state_dict(found, config, source=where)
    tokenizer = tokenizer or load_hf_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} rows"
        )
    if not (folder / NATIVE_TOKENIZER).is_file() and tokenizer.eot_token is not None:
        # OpenAI's models were trained on documents with this mark between them.
        tokenizer = copy.copy(tokenizer)
        tokenizer.prepends_eot = facts.get("bos_token_id") == tokenizer.eot_token
    return ModelBundle(config, tensors, tokenizer)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()


def _special_ids(end: int) -> dict[str, int]:
    return {f"{name}_token_id": end for name in ("bos", "eos", "pad")}


def _config(config: GPTConfig, end: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: values[0] for name, values in FIXED_CONFIG.items()},
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
    most = 8 * (2 * formulas.num_params(config) + masks) + MAX_EXTRA_BYTES
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
            check_file_size(path, most)
            found |= load_file(path) if is_safetensors else _pickled(path)
    return found


def _weights(folder: Path) -> list[Path]:
    """The files that hold a folder's weights; the older form only where the newer is missing."""
    return sorted(folder.glob(SAFETENSORS_WEIGHTS)) or sorted(folder.glob(PYTORCH_WEIGHTS))


def _pickled(path: Path) -> dict[str, Tensor]:
    tensors = read_torch_file(path, what="weights of transformers'")
    if not isinstance(tensors, Mapping):
        raise ValueError("no names with tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{short_repr(name)} is no tensor")
    check_tensors(path, {name: tensor for name, tensor in tensors.items() if name != LM_HEAD})
    return dict(tensors)


def _require_size(folder: Path, config: GPTConfig) -> None:
    """A few bytes of a stranger's config.json must not make anybody build a terabyte."""
    present = sum(path.stat().st_size for path in _weights(folder))
    if present and 2 * formulas.num_params(config) > present:
        raise UserError(
            f"{folder.as_posix()}/config.json describes {formulas.num_params(config):,} parameters, "
            f"but its weights have {present:,} bytes"
        )


@torch.inference_mode()
def _check(folder: Path, parts: ModelBundle, end: int) -> float:
    """Read the folder as transformers does, and compare."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # The mark between documents is no text: ours reads one in a text letter by letter.
    count = min(64, parts.config.block_size, parts.tokenizer.vocab_size)
    ids = [i for i in range(count) if i != parts.tokenizer.eot_token]
    text = parts.tokenizer.decode_bytes(ids).decode("utf-8", "ignore")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = theirs.encode(text, add_special_tokens=False)
    if ids != parts.tokenizer.encode(text).tolist() or theirs.eos_token_id != end:
        raise RunError("transformers reads another tokenizer out of the export: it was not kept")
    peer = transformers.GPT2LMHeadModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()
    rows = probe_ids(parts.config, parts.config.vocab_size)
    difference = float((peer(rows).logits - parts.build_model()(rows)).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise RunError(
            f"the exported model's logits differ by {difference:.2e}, more than "
            f"{MAX_LOGIT_DIFFERENCE:.0e}: the export was not kept"
        )
    return difference


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
