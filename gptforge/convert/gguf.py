"""Export to llama.cpp's GGUF: weights, configuration and tokenizer in one file."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    MAX_LOGIT_DIFFERENCE,
    ModelBundle,
    probe_ids,
    with_eos_token,
)
from gptforge.convert.hf_tokenizer import bytes_to_unicode, tokenizer_json
from gptforge.errors import RunError, UserError, require_package
from gptforge.estimate import formulas
from gptforge.files import atomic_replace
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

GGUF_TYPES = ("f32", "f16", "q8_0")

# GPT-2's tensor names to llama.cpp's; matrices are (out, in) in both.
TENSORS = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
BLOCK_MODULES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(
    path: Path, bundle: ModelBundle, *, outtype: str, name: str, description: str = ""
) -> float:
    """Write the file atomically; returns the largest difference of logits when read back.

    Args:
        path: the file to write.
        bundle: the model.
        outtype: one of GGUF_TYPES, for matrices. Vectors and position embeddings stay float32.
        name: the model's name in llama.cpp.
        description: one line about the model.

    Raises:
        UserError: if the gguf package is missing or the shape does not suit `outtype`.
        RunError: if the logits differ when the file is read back.
    """
    require_package("gguf", extra="gguf")
    import gguf

    bundle, eos_id = with_eos_token(bundle)
    config = bundle.config
    if outtype not in GGUF_TYPES:
        raise UserError(f"--type {outtype}: give one of {', '.join(GGUF_TYPES)}")
    if outtype == "q8_0" and config.n_embd % 32:
        raise UserError(
            f"q8_0 has blocks of 32 numbers: n_embd {config.n_embd} is not a multiple of 32"
        )
    tokens, merges = _vocabulary(bundle.tokenizer, eos_id)
    with atomic_replace(path) as partial:
        writer = gguf.GGUFWriter(partial, "gpt2")
        _add_metadata(writer, config, outtype, name, description)
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
        writer.add_bos_token_id(eos_id)
        writer.add_eos_token_id(eos_id)
        writer.add_unk_token_id(eos_id)
        writer.add_pad_token_id(eos_id)
        writer.add_add_bos_token(False)
        for key, tensor in bundle.state_dict.items():
            is_matrix = tensor.ndim == 2 and key != "transformer.wpe.weight"
            dtype = gguf.GGMLQuantizationType[outtype.upper() if is_matrix else "F32"]
            values = gguf.quants.quantize(tensor.numpy(), dtype)
            writer.add_tensor(gguf_name(key), values, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return _check(partial, bundle, is_exact=outtype == "f32")


def gelu_tanh_difference(bundle: ModelBundle) -> float:
    """Largest change of the logits by llama.cpp's GELU, which is the tanh form for every GPT-2."""
    config = dataclasses.replace(bundle.config, activation="gelu_tanh")
    if config == bundle.config:
        return 0.0
    size = bundle.tokenizer.vocab_size
    ids = probe_ids(bundle.config, size)
    tanh = dataclasses.replace(bundle, config=config)
    with torch.inference_mode():
        difference = (tanh.build_model()(ids) - bundle.build_model()(ids))[:, :, :size]
    return float(difference.abs().max())


def gguf_name(name: str) -> str:
    """llama.cpp's name for a tensor of GPT-2's."""
    if name in TENSORS:
        return TENSORS[name]
    layer, rest = name.removeprefix("transformer.h.").split(".", 1)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{BLOCK_MODULES[module]}.{kind}"


def _add_metadata(
    writer: Any, config: GPTConfig, outtype: str, name: str, description: str
) -> None:
    """Metadata under `general.`, without a licence: that depends on the training text."""
    import gguf

    num_params = formulas.num_params(config)
    writer.add_type("model")
    writer.add_name(name)
    if description:
        writer.add_description(description)
    writer.add_size_label(gguf.size_label(num_params, num_params, 0, 0))
    writer.add_tags(["text-generation", "gpt2"])
    prefix = "ALL" if outtype == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{outtype.upper()}"])
    if outtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(tokenizer: Tokenizer, eos_id: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE, the only kind that llama.cpp has for GPT-2.

    A character of several bytes is merged from them; the steps between need no tokens.
    """
    record = tokenizer.to_json()
    byte_chars = bytes_to_unicode()
    if record["kind"] == "char":
        tokens = [
            "".join(byte_chars[byte] for byte in char.encode("utf-8"))
            for char in str(record["alphabet"])
        ]
        merges = [f"{token[:i]} {token[i]}" for token in tokens for i in range(1, len(token))]
        merges = list(dict.fromkeys(merges))
        tokens.append(END_OF_TEXT)
    else:
        model: dict[str, Any] = tokenizer_json(tokenizer, eos_id)["model"]
        vocab: dict[str, int] = model["vocab"]
        tokens = sorted(vocab, key=lambda token: vocab[token])
        merges = [" ".join(pair) for pair in model["merges"]]
    # GGUF cannot store an empty list: merge two NULs, which no text contains.
    return tokens, merges or [f"{byte_chars[0]} {byte_chars[0]}"]


@torch.inference_mode()
def _check(path: Path, bundle: ModelBundle, *, is_exact: bool) -> float:
    """Read the file back and compare logits; quantized ones are only reported."""
    import gguf

    tensors = {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    state_dict = {key: tensors[gguf_name(key)] for key in bundle.state_dict}
    ids = probe_ids(bundle.config, bundle.config.vocab_size)
    logits = dataclasses.replace(bundle, state_dict=state_dict).build_model()(ids)
    difference = float((logits - bundle.build_model()(ids)).abs().max())
    if is_exact and not difference <= MAX_LOGIT_DIFFERENCE:
        raise RunError(f"the file's logits differ by {difference:.2e}: it was not kept")
    return difference
