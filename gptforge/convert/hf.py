"""To and from transformers' GPT2LMHeadModel: a folder of safetensors, JSON and a model card."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gptforge.checkpoint.format import MAX_EXTRA_BYTES
from gptforge.checkpoint.state_dict import save_safetensors
from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    MAX_LOGIT_DIFFERENCE,
    ModelBundle,
    logit_difference,
    read_size,
    validate_state_dict,
    with_eos_token,
)
from gptforge.convert.hf_tokenizer import NATIVE_TOKENIZER, load_hf_tokenizer, tokenizer_json
from gptforge.convert.torch_file import check_tensors, read_torch_file
from gptforge.errors import RunError, UserError, parsing
from gptforge.estimate import formulas
from gptforge.files import check_file_size, read_text
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import save as save_tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

PREFIX = "transformer."
"""Of tensor names in transformers and here. OpenAI's files have none, and every program reads
those; some read no others."""
# Conv1D weights, stored (in, out) there and (out, in) here.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CAUSAL_MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")  # in old checkpoints

SAFETENSORS_WEIGHTS, PYTORCH_WEIGHTS = "model*.safetensors", "pytorch_model*.bin"
OTHER_FILES = (
    *("config.json", "tokenizer.json", "gptforge*.json"),
    *("merges.txt", "vocab.json", "added_tokens.json"),
)
"""Files that are read besides the weights."""

FIXED_CONFIG: Mapping[str, object] = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Settings of config.json that are fixed here."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu": ("gelu", "gelu_python"),
}
"""Our names to transformers'; the first is written."""


def write_hf(folder: Path, bundle: ModelBundle, *, card: str) -> None:
    """Fill an empty folder."""
    bundle, eos_id = with_eos_token(bundle)
    tensors = {
        name.removeprefix(PREFIX): (t.t() if name.endswith(TRANSPOSED) else t).contiguous()
        for name, t in bundle.state_dict.items()
    }
    save_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    special_ids = {f"{name}_token_id": eos_id for name in ("bos", "eos", "pad")}
    top_k = min(200, bundle.tokenizer.vocab_size)
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": top_k}
    for name, record in {
        "config.json": hf_config(bundle.config, special_ids),
        "generation_config.json": {**sampling, **special_ids},
        "tokenizer.json": tokenizer_json(bundle.tokenizer, eos_id),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": bundle.config.block_size,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "unk", "pad")},
        },
    }.items():
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    save_tokenizer(bundle.tokenizer, folder / NATIVE_TOKENIZER)
    (folder / "README.md").write_text(card, encoding="utf-8")


def is_hf_dir(folder: Path) -> bool:
    """Whether a folder has the format of transformers' `save_pretrained`."""
    return (folder / "config.json").is_file()


def model_files(folder: Path) -> list[Path]:
    """All files that `read_hf` may read."""
    others = (path for pattern in OTHER_FILES for path in folder.glob(pattern))
    return sorted({*_weight_files(folder), *others})


def read_hf(folder: Path, *, tokenizer: Tokenizer | None = None) -> ModelBundle:
    """A GPT-2 that transformers or `write_hf` saved; a UserError if it is not one."""
    source = folder.as_posix()
    with parsing(f"{source}/config.json", "a GPT-2's configuration"):
        hf_config = json.loads(read_text(folder / "config.json"))
        config = _parse_config(hf_config)
    tensors = {}
    for name, tensor in _read_tensors(folder, config).items():
        name = name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name
        if not name.endswith(CAUSAL_MASK_BUFFERS):
            is_transposed = name.endswith(TRANSPOSED) and tensor.ndim == 2
            tensors[name] = tensor.t() if is_transposed else tensor
    state_dict = validate_state_dict(tensors, config, source=source)
    tokenizer = tokenizer or load_hf_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model {config.vocab_size} rows"
        raise UserError(f"{source}: the tokenizer has {sizes}")
    if not (folder / NATIVE_TOKENIZER).is_file() and tokenizer.eot_token is not None:
        # OpenAI's models were trained on documents separated by this token.
        tokenizer = copy.copy(tokenizer)
        tokenizer.prepends_eot = hf_config.get("bos_token_id") == tokenizer.eot_token
    return ModelBundle(config, state_dict, tokenizer)


def hf_config(config: GPTConfig, special_ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The content of transformers' config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **FIXED_CONFIG,
        "activation_function": ACTIVATIONS[config.activation][0],
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        **{name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
        "n_inner": None if config.mlp_ratio == 4 else config.mlp_ratio * config.n_embd,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        **special_ids,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _parse_config(hf_config: dict[str, Any]) -> GPTConfig:
    for name, supported in FIXED_CONFIG.items():
        if (value := hf_config.get(name, supported)) != supported:
            raise ValueError(f"{name} is {short_repr(value)}, GPT-2's is {supported!r}")
    function = hf_config.get("activation_function", "gelu_new")
    activation = next((name for name, names in ACTIVATIONS.items() if function in names), None)
    if activation is None:
        known = ", ".join(name for names in ACTIVATIONS.values() for name in names)
        shown = short_repr(function)
        raise ValueError(f"activation_function is {shown}: GPT-2's is one of {known}")
    n_embd, mlp_ratio = read_size(hf_config, "n_embd"), 4
    if hf_config.get("n_inner") is not None:
        mlp_ratio, rest = divmod(read_size(hf_config, "n_inner"), n_embd)
        if rest:
            raise ValueError(f"n_inner {hf_config['n_inner']} is not a multiple of n_embd {n_embd}")
    positions = {"n_positions": hf_config.get("n_ctx", 1024), **hf_config}
    names = ("vocab_size", "n_layer", "n_head", "n_embd")
    return GPTConfig(
        block_size=read_size(positions, "n_positions"),
        **{name: read_size(hf_config, name) for name in names},
        mlp_ratio=mlp_ratio,
        activation=activation,
    )


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors files, or PyTorch's where there are none."""
    return sorted(folder.glob(SAFETENSORS_WEIGHTS)) or sorted(folder.glob(PYTORCH_WEIGHTS))


def _read_tensors(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """All tensors of a folder, in one file or several."""
    # At most: float64 weights, an untied output layer, and causal masks.
    masks = config.n_layer * config.block_size**2
    max_bytes = 8 * (2 * formulas.num_params(config) + masks) + MAX_EXTRA_BYTES
    paths = _weight_files(folder)
    if not paths:
        known = "model.safetensors nor pytorch_model.bin"
        hint = "other formats of weights are not supported"
        raise UserError(f"{folder.as_posix()} has neither {known}; {hint}")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        is_safetensors = path.suffix == ".safetensors"
        what = "a readable safetensors file" if is_safetensors else "weights of transformers'"
        with parsing(path, what):
            check_file_size(path, max_bytes)
            tensors |= load_file(path) if is_safetensors else _read_pytorch_weights(path)
    return tensors


def _read_pytorch_weights(path: Path) -> dict[str, Tensor]:
    tensors = read_torch_file(path, what="weights of transformers'")
    if not isinstance(tensors, Mapping):
        raise ValueError("not a dictionary of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{short_repr(name)} is not a tensor")
    check_tensors(path, tensors)
    return dict(tensors)


def check_hf(folder: Path, bundle: ModelBundle) -> float:
    """The difference of transformers' logits to ours; a RunError for another model or tokenizer."""
    import transformers

    bundle, eos_id = with_eos_token(bundle)
    transformers.utils.logging.disable_progress_bar()
    # Without the end-of-text token: as text, our tokenizers encode it letter by letter.
    tokenizer = bundle.tokenizer
    count = min(64, bundle.config.block_size, tokenizer.vocab_size)
    ids = [i for i in range(count) if i != tokenizer.eot_token]
    text = tokenizer.decode_bytes(ids).decode("utf-8", "ignore")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = hf_tokenizer.encode(text, add_special_tokens=False)
    if ids != tokenizer.encode(text).tolist() or hf_tokenizer.eos_token_id != eos_id:
        raise RunError("transformers loads a different tokenizer from the export: it was not kept")
    hf_model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()
    difference = logit_difference(
        bundle, lambda ids: hf_model(ids).logits, bundle.config.vocab_size
    )
    if not difference <= MAX_LOGIT_DIFFERENCE:
        limit = f"more than {MAX_LOGIT_DIFFERENCE:.0e}: the export was not kept"
        raise RunError(f"the exported model's logits differ by {difference:.2e}, {limit}")
    return difference
