"""A model taken apart: what every form of it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptforge.config import GPTConfig
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.printable import MAX_NAME, printable, short_repr
from gptforge.tokenizers import Tokenizer

LM_HEAD = "lm_head.weight"
WTE = "transformer.wte.weight"
MAX_DIM = 2**31 - 1
"""Largest size that a model may have in any direction."""


@dataclass(frozen=True)
class ModelBundle:
    """Shape, float32 weights under their GPT-2 names (the tied table once), and tokenizer."""

    config: GPTConfig
    state_dict: Mapping[str, Tensor]
    tokenizer: Tokenizer

    def build_model(self) -> GPT:
        """The parts put together, on the CPU, ready to be asked."""
        model = GPT(self.config)
        model.load_state_dict({**self.state_dict, LM_HEAD: self.state_dict[WTE]})
        return model.eval()


def read_size(facts: Mapping[str, Any], name: str) -> int:
    """A size out of a stranger's configuration: a whole number from 1 to what a tensor may have.

    Raises:
        KeyError: if it is missing.
        ValueError: if it is anything else.
    """
    size = facts[name]
    if type(size) is not int or not 1 <= size <= MAX_DIM:
        given = short_repr(size)
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_DIM:,}, not {given}")
    return size


def validate_state_dict(
    state_dict: Mapping[str, Tensor], config: GPTConfig, *, source: str, fill_biases: bool = False
) -> dict[str, Tensor]:
    """The tensors that a model of this shape has, in float32.

    Args:
        tensors: under our names, each (out, in).
        config: the shape that they should fit.
        source: where they come from, for errors.
        fill_biases: take 0 for biases that are missing.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape.
    """
    if config.n_embd % config.n_head:
        raise UserError(
            f"{source}: {config.n_embd} channels do not divide into {config.n_head} heads"
        )
    if config.n_layer > len(state_dict):
        raise UserError(f"{source}: {config.n_layer} layers, but only {len(state_dict)} tensors")
    with torch.device("meta"):
        outline = GPT(config).state_dict()
    wanted = {name: tensor.shape for name, tensor in outline.items() if name != LM_HEAD}
    strangers = sorted(state_dict.keys() - wanted.keys() - {LM_HEAD})
    if strangers:
        name = printable(strangers[0], MAX_NAME)
        raise UserError(f"{source}: a GPT-2 has no tensor '{name}'")
    found = {}
    for name, shape in wanted.items():
        if name not in state_dict and fill_biases and name.endswith("bias"):
            found[name] = torch.zeros(shape)
        elif name not in state_dict:
            raise UserError(f"{source}: the tensor '{name}' is missing")
        elif not is_dense_real(state_dict[name]):
            raise UserError(f"{source}: '{name}' is not a dense tensor of real numbers")
        elif state_dict[name].shape != shape:
            given = tuple(state_dict[name].shape)
            raise UserError(f"{source}: '{name}' has shape {given}, its shape says {tuple(shape)}")
        else:
            found[name] = state_dict[name].detach().float().contiguous().clone()
    head = state_dict.get(LM_HEAD)
    if head is not None and not is_dense_real(head):
        raise UserError(f"{source}: '{LM_HEAD}' is not a dense tensor of real numbers")
    if head is not None and not torch.equal(head.float(), found[WTE]):
        raise UserError(f"{source}: its output layer is not its token table; GPT-2 ties the two")
    return found


def is_dense_real(value: object) -> bool:
    """Whether a value out of a stranger's file is a tensor that can be copied into float32."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def with_eos_token(bundle: ModelBundle) -> tuple[ModelBundle, int]:
    """The model with exactly the ids that other programs know, and its end-of-text id.

    They all want such an id. Where the tokenizer has none, a spare row of the embedding serves:
    training made it as unlikely as every id that no text has. Where there is no spare row, one is
    added: a copy of the row that is least likely of all. Other spare rows are cut off, so that
    nobody samples an id without a token.
    """
    tokenizer, table = bundle.tokenizer, bundle.state_dict[WTE]
    end = tokenizer.vocab_size if tokenizer.eot_token is None else tokenizer.eot_token
    rows = max(tokenizer.vocab_size, end + 1)
    if rows > len(table):
        table = torch.cat([table, table[None, _least_likely(bundle)]])
    config = GPTConfig(**{**vars(bundle.config), "vocab_size": rows})
    return ModelBundle(
        config, {**bundle.state_dict, WTE: table[:rows].contiguous()}, tokenizer
    ), end


@torch.inference_mode()
def _least_likely(parts: ModelBundle) -> int:
    size = parts.tokenizer.vocab_size
    logits = parts.build_model()(probe_ids(parts.config, size))[..., :size]
    return int(logits.softmax(-1).mean((0, 1)).argmin())


def probe_ids(config: GPTConfig, vocab_size: int) -> Tensor:
    """Ids to compare logits on: (2, T), the same every time."""
    dice = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (2, min(config.block_size, 128)), generator=dice)


@torch.inference_mode()
def unused_row_probability(bundle: ModelBundle) -> float:
    """The most that the model gives a spare row which an export uses as end-of-text id.

    Evaluation and sampling here leave that row out; another program samples it like any other id.

    Returns:
        The largest probability at some positions; 0 where the tokenizer has such an id of its own.
    """
    size = bundle.tokenizer.vocab_size
    if bundle.tokenizer.eot_token is not None or bundle.config.vocab_size == size:
        return 0.0
    logits = bundle.build_model()(probe_ids(bundle.config, size))[..., : size + 1]
    return float(logits.softmax(-1)[..., size].max())
