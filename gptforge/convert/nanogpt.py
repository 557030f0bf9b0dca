"""From nanoGPT's ckpt.pt, read without running any code that may be in it."""

from pathlib import Path

from gptforge.config import GPTConfig
from gptforge.convert.bundle import (
    LM_HEAD,
    ModelBundle,
    read_size,
    validate_state_dict,
)
from gptforge.convert.torch_file import check_tensors, read_torch_file
from gptforge.errors import UserError, parsing
from gptforge.files import check_file_size
from gptforge.tokenizers import Tokenizer, from_name

COMPILE_PREFIX = "_orig_mod."
"""What torch.compile leaves in names."""
MAX_BYTES = 2**38
"""Of a file that is read: a hundred times GPT-2 XL with its optimizer."""
DEFAULT_VOCAB_SIZE = 50304
"""Rows of the token table where a nanoGPT data set does not say its size: GPT-2's, rounded up."""


def read_nanogpt(path: Path, *, tokenizer: Tokenizer | None = None) -> ModelBundle:
    """The model in a ckpt.pt. Where nanoGPT leaves biases out, ours are 0, which is the same.

    Args:
        path: the file.
        tokenizer: what it was trained with; None: GPT-2's, if the size fits.

    Raises:
        UserError: if it is something else, or holds more than tensors and plain values, or the
            tokenizer has another number of ids.
    """
    try:
        check_file_size(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    record = read_torch_file(path, what="nanoGPT's ckpt.pt")
    with parsing(path, "a checkpoint of nanoGPT"):
        shape, tensors = record["model_args"], record["model"]
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        sizes = {name: read_size(shape, name) for name in names}
        # nn.GELU() in its model.py, without an approximation; ckpt.pt does not say it.
        config = GPTConfig(**sizes, activation="gelu")
        found = {name.removeprefix(COMPILE_PREFIX): tensor for name, tensor in tensors.items()}
        found = {name: tensor for name, tensor in found.items() if not name.endswith(".attn.bias")}
        check_tensors(path, {name: tensor for name, tensor in found.items() if name != LM_HEAD})
        tensors = validate_state_dict(found, config, source=path.as_posix(), fill_biases=True)
    if tokenizer is None and config.vocab_size in (50257, DEFAULT_VOCAB_SIZE):
        tokenizer = from_name("gpt2", "")
    if tokenizer is None:
        raise UserError(
            f"{path}: {config.vocab_size} ids, and the file does not say of what: for characters "
            "give --tokenizer char --text with the text that it learned, else another --tokenizer"
        )
    if not _is_of(tokenizer, config.vocab_size):
        own, remedy = f"the {tokenizer.name} tokenizer has {tokenizer.vocab_size:,}", "--tokenizer"
        if tokenizer.name == "char":
            own, remedy = f"the text given has {tokenizer.vocab_size:,} characters", "whole --text"
        raise UserError(
            f"{path}: the model has {config.vocab_size:,} ids, but {own}: give the {remedy} that "
            "it learned with"
        )
    return ModelBundle(config, tensors, tokenizer)


def _is_of(tokenizer: Tokenizer, rows: int) -> bool:
    """Whether a table of so many rows may be this tokenizer's; another one would write nonsense."""
    if rows == DEFAULT_VOCAB_SIZE and tokenizer.name not in ("char", "byte"):
        return tokenizer.vocab_size <= rows
    return rows in (tokenizer.vocab_size, -(-tokenizer.vocab_size // 64) * 64)
