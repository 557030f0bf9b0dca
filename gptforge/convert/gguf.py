"""To llama.cpp's GGUF: one file with weights, shape and tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptforge.config import GPTConfig
from gptforge.convert.bundle import ModelBundle, probe_ids, with_eos_token
from gptforge.convert.hf_tokenizer import bytes_to_unicode, tokenizer_json
from gptforge.errors import RunError, UserError, require_package
from gptforge.estimate import formulas
from gptforge.files import atomic_replace
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import END_OF_TEXT

GGUF_TYPES = ("f32", "f16", "q8_0")
MAX_LOGIT_DIFFERENCE = 1e-4
"""Of logits, as float32 is read back; halves and eighths of a number are told of, not judged."""

# GPT-2's names to llama.cpp's; both are (out, in) here.
ENDS = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
}
BLOCK = {
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
    """Write the file, whole; returns the largest difference of its logits to ours.

    Args:
        path: the file to write.
        parts: the model.
        kind: one of TYPES: what its matrices are stored in. Vectors and positions stay float32.
        name: what llama.cpp shows.
        description: one line about the model.

    Raises:
        UserError: if the gguf package is missing or the shape does not suit.
        RunError: if the file read back is another model.
    """
    require_package("gguf", extra="gguf")
    import gguf

    bundle, end = with_eos_token(bundle)
    config = bundle.config
    if outtype not in GGUF_TYPES:
        raise UserError(f"--type {outtype}: give one of {', '.join(GGUF_TYPES)}")
    if outtype == "q8_0" and config.n_embd % 32:
        raise UserError(f"q8_0 stores 32 numbers together: n_embd {config.n_embd} does not divide")
    tokens, merges = _vocabulary(bundle.tokenizer, end)
    with atomic_replace(path) as partial:
        writer = gguf.GGUFWriter(partial, "gpt2")
        _describe(writer, config, outtype, name, description)
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
        writer.add_token_types([control if i == end else normal for i in range(len(tokens))])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
        writer.add_unk_token_id(end)
        writer.add_pad_token_id(end)
        writer.add_add_bos_token(False)
        stored = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}[outtype]
        for our, tensor in bundle.state_dict.items():
            is_matrix = tensor.ndim == 2 and our != "transformer.wpe.weight"
            as_type = gguf.GGMLQuantizationType[stored if is_matrix else "F32"]
            values = gguf.quants.quantize(tensor.numpy(), as_type)
            writer.add_tensor(gguf_name(our), values, raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return _check(partial, bundle, is_exact=outtype == "f32")


def gelu_tanh_difference(bundle: ModelBundle) -> float:
    """How far llama.cpp's logits are off for its GELU, which is the tanh form for every GPT-2."""
    config = dataclasses.replace(bundle.config, activation="gelu_tanh")
    if config == bundle.config:
        return 0.0
    ids = probe_ids(bundle.config, bundle.tokenizer.vocab_size)
    with torch.inference_mode():
        theirs = ModelBundle(config, bundle.state_dict, bundle.tokenizer).build_model()(ids)
        difference = (theirs - bundle.build_model()(ids))[:, :, : bundle.tokenizer.vocab_size]
    return float(difference.abs().max())


def gguf_name(name: str) -> str:
    """llama.cpp's name of one of our tensors."""
    if name in ENDS:
        return ENDS[name]
    number, rest = name.removeprefix("transformer.h.").split(".", 1)
    module, part = rest.rsplit(".", 1)
    return f"blk.{number}.{BLOCK[module]}.{part}"


def _describe(writer: Any, config: GPTConfig, kind: str, name: str, description: str) -> None:
    """Metadata under `general.`; no licence, which depends on the text that was learned."""
    import gguf

    count = formulas.num_params(config)
    writer.add_type("model")
    writer.add_name(name)
    if description:
        writer.add_description(description)
    writer.add_size_label(gguf.size_label(count, count, 0, 0))
    writer.add_tags(["text-generation", "gpt2"])
    types = gguf.LlamaFileType
    file_type = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(file_type[kind])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(tokenizer: Tokenizer, end: int) -> tuple[list[str], list[str]]:
    """Tokens and merges.

    llama.cpp knows byte-level BPE. Characters become that too: one of several bytes is merged from
    them, and needs no token for the steps between.
    """
    record = tokenizer.to_json()
    if record["kind"] == "char":
        spelled = [_spelled(char) for char in str(record["alphabet"])]
        merges = [f"{word[:i]} {word[i]}" for word in spelled for i in range(1, len(word))]
        merges = list(dict.fromkeys(merges))
        spelled.append(END_OF_TEXT)
    else:
        model: dict[str, Any] = tokenizer_json(tokenizer, end)["model"]
        vocab: dict[str, int] = model["vocab"]
        spelled = sorted(vocab, key=lambda token: vocab[token])
        merges = [" ".join(pair) for pair in model["merges"]]
    # An empty list has no type in GGUF: NUL twice, which no text holds.
    nul = bytes_to_unicode()[0]
    return spelled, merges or [f"{nul} {nul}"]


def _spelled(text: str) -> str:
    characters = bytes_to_unicode()
    return "".join(characters[byte] for byte in text.encode("utf-8"))


@torch.inference_mode()
def _check(path: Path, parts: ModelBundle, *, is_exact: bool) -> float:
    """Read the file back with the library, and compare logits."""
    import gguf

    read = {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    back = {our: read[gguf_name(our)] for our in parts.state_dict}
    ids = probe_ids(parts.config, parts.config.vocab_size)
    theirs = ModelBundle(parts.config, back, parts.tokenizer).build_model()(ids)
    difference = float((theirs - parts.build_model()(ids)).abs().max())
    if is_exact and not difference <= MAX_LOGIT_DIFFERENCE:
        raise RunError(f"the file's logits differ by {difference:.2e}: it was not kept")
    return difference
