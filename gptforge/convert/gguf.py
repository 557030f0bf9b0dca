"""Export to llama.cpp's GGUF: weights, configuration and tokenizer in one file."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptforge.convert.bundle import (
    MAX_LOGIT_DIFFERENCE,
    ModelBundle,
    logit_difference,
    with_eos_token,
)
from gptforge.convert.hf_tokenizer import tokenizer_json
from gptforge.errors import RunError, UserError
from gptforge.estimate import formulas
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT, bytes_to_unicode
from gptforge.tokenizers.char import CharTokenizer

GGUF_TYPES = ("f32", "f16", "q8_0")


def write_gguf(
    path: Path, bundle: ModelBundle, *, outtype: str, name: str, description: str = ""
) -> None:
    """Write the file; `outtype` is for matrices: vectors and position embeddings stay float32."""
    import gguf

    bundle, eos_id = with_eos_token(bundle)
    config = bundle.config
    assert outtype in GGUF_TYPES, outtype
    if outtype == "q8_0" and config.n_embd % 32:
        problem = f"n_embd {config.n_embd} is not a multiple of 32"
        raise UserError(f"q8_0 has blocks of 32 numbers: {problem}")
    tokens, merges = _vocabulary(bundle.tokenizer, eos_id)
    writer = gguf.GGUFWriter(path, "gpt2")
    # No licence: that depends on the training text.
    writer.add_type("model")
    writer.add_name(name)
    if description:
        writer.add_description(description)
    num_params = formulas.num_params(config)
    writer.add_size_label(gguf.size_label(num_params, num_params, 0, 0))
    writer.add_tags(["text-generation", "gpt2"])
    prefix = "ALL" if outtype == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{outtype.upper()}"])
    if outtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_ratio * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_token_types([control if i == eos_id else normal for i in range(len(tokens))])
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{kind}_token_id")(eos_id)
    writer.add_add_bos_token(False)
    names = _tensor_names(bundle)
    for key, tensor in bundle.state_dict.items():
        is_matrix = tensor.ndim == 2 and key != "transformer.wpe.weight"
        dtype = gguf.GGMLQuantizationType[outtype.upper() if is_matrix else "F32"]
        values = gguf.quants.quantize(tensor.numpy(), dtype)
        writer.add_tensor(names[key], values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gelu_tanh_difference(bundle: ModelBundle) -> float:
    """Largest change of the logits by llama.cpp's GELU, which is the tanh form for every GPT-2."""
    config = dataclasses.replace(bundle.config, activation="gelu_tanh")
    if config == bundle.config:
        return 0.0
    tanh = dataclasses.replace(bundle, config=config).build_model()
    return logit_difference(bundle, tanh, bundle.tokenizer.vocab_size)


def _tensor_names(bundle: ModelBundle) -> dict[str, str]:
    """llama.cpp's name of each tensor; matrices are (out, in) in both."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, bundle.config.n_layer)
    return {key: names.get_name(key, (".weight", ".bias")) for key in bundle.state_dict}


def _vocabulary(tokenizer: Tokenizer, eos_id: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, the only kind that llama.cpp has for GPT-2.

    A character of several bytes is merged from them; the steps between need no tokens.
    """
    byte_chars = bytes_to_unicode()
    if isinstance(tokenizer, CharTokenizer):
        chars = (char.encode("utf-8") for char in tokenizer.alphabet)
        tokens = ["".join(byte_chars[byte] for byte in char) for char in chars]
        merges = [f"{token[:i]} {token[i]}" for token in tokens for i in range(1, len(token))]
        merges = list(dict.fromkeys(merges))
        tokens.append(END_OF_TEXT)
    else:
        model: dict[str, Any] = tokenizer_json(tokenizer, eos_id)["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        merges = [" ".join(pair) for pair in model["merges"]]
    # GGUF cannot store an empty list: merge two NULs, which no text contains.
    return tokens, merges or [f"{byte_chars[0]} {byte_chars[0]}"]


def check_gguf(path: Path, bundle: ModelBundle, *, outtype: str) -> float:
    """The largest difference of logits when the file is read back; a RunError if f32 has any."""
    import gguf

    bundle, _ = with_eos_token(bundle)
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(np.array(values, np.float32))
    state_dict = {key: tensors[name] for key, name in _tensor_names(bundle).items()}
    model = dataclasses.replace(bundle, state_dict=state_dict).build_model()
    difference = logit_difference(bundle, model, bundle.config.vocab_size)
    if not math.isfinite(difference):
        hint = "the weights are too large for this type, use --type f32"
        raise RunError(f"the file's logits are NaN or Inf: it was not kept; {hint}")
    if outtype == "f32" and not difference <= MAX_LOGIT_DIFFERENCE:
        raise RunError(f"the file's logits differ by {difference:.2e}: it was not kept")
    return difference
