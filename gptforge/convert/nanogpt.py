"""Import nanoGPT's ckpt.pt, without running any code in it."""

from collections.abc import Mapping
from pathlib import Path

from gptforge.config import GPTConfig
from gptforge.convert.bundle import ModelBundle, read_size, validate_state_dict
from gptforge.convert.torch_file import check_tensors, read_torch_file
from gptforge.errors import UserError, parsing
from gptforge.files import check_file_size
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer, from_name

COMPILE_PREFIX = "_orig_mod."  # what torch.compile puts before names
MAX_BYTES = 2**38  # of the file: a hundred times GPT-2 XL with its optimizer
DEFAULT_VOCAB_SIZE = 50304  # nanoGPT's where the data set does not say: GPT-2's, rounded up


def read_nanogpt(path: Path, *, tokenizer: Tokenizer | None = None) -> ModelBundle:
    """The model in a ckpt.pt; biases that nanoGPT leaves out are zeros.

    `tokenizer` is the one that it was trained with; None: GPT-2's, if the size fits.
    """
    with parsing(path, "a checkpoint of nanoGPT"):
        check_file_size(path, MAX_BYTES)
        checkpoint = read_torch_file(path, what="nanoGPT's ckpt.pt")
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"{type(checkpoint).__name__} instead of a dictionary")
        model_args, state_dict = checkpoint["model_args"], checkpoint["model"]
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        sizes = {name: read_size(model_args, name) for name in names}
        # nanoGPT's model.py has nn.GELU(), the exact form; ckpt.pt does not say.
        config = GPTConfig(**sizes, activation="gelu")
        tensors = {
            name.removeprefix(COMPILE_PREFIX): tensor
            for name, tensor in state_dict.items()
            if not name.endswith(".attn.bias")
        }
        check_tensors(path, tensors)
        tensors = validate_state_dict(tensors, config, source=path.as_posix(), fill_biases=True)
    if tokenizer is None and config.vocab_size in (50257, DEFAULT_VOCAB_SIZE):
        tokenizer = from_name("gpt2", "")
    if tokenizer is None:
        raise UserError(
            f"{path}: the vocabulary has {config.vocab_size} tokens, and the file does not say "
            f"which: gptforge import {quote(path.as_posix())} OUT --tokenizer char --text FILE, "
            "with the training text, if they are characters, else --tokenizer FILE"
        )
    rows, size = config.vocab_size, tokenizer.vocab_size
    fits = rows in (size, -(-size // 64) * 64)
    if rows == DEFAULT_VOCAB_SIZE and tokenizer.name not in ("char", "byte"):
        fits = size <= rows
    if not fits:
        found, hint = f"the {tokenizer.name} tokenizer has {size:,}", "--tokenizer"
        if tokenizer.name == "char":
            found, hint = f"--text has {size:,} characters", "full --text"
        problem = f"the model has {rows:,} ids, but {found}"
        raise UserError(f"{path}: {problem}: give the {hint} that it was trained with")
    return ModelBundle(config, tensors, tokenizer)
