"""What every model format consists of: configuration, weights and tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptforge.checkpoint.state_dict import TIED_WEIGHT, check_shapes, untied_state_dict
from gptforge.config import GPTConfig
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.printable import MAX_NAME, printable, short_repr
from gptforge.tokenizers import Tokenizer

WTE = "transformer.wte.weight"
MAX_DIM = 2**31 - 1  # largest dimension that a model may have
# Between float32 logits of two programs: more than another order of additions explains.
MAX_LOGIT_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class ModelBundle:
    """A model's configuration, float32 weights under GPT-2's names (wte once), and tokenizer."""

    config: GPTConfig
    state_dict: Mapping[str, Tensor]
    tokenizer: Tokenizer

    def build_model(self) -> GPT:
        """The model on the CPU, in eval mode."""
        model = GPT(self.config)
        model.load_state_dict({**self.state_dict, TIED_WEIGHT: self.state_dict[WTE]})
        return model.eval()


def read_size(config: Mapping[str, Any], name: str) -> int:
    """A dimension from an untrusted configuration; a KeyError or ValueError if it is not one."""
    size = config[name]
    if type(size) is not int or not 1 <= size <= MAX_DIM:
        shown = short_repr(size)
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_DIM:,}, not {shown}")
    return size


def validate_state_dict(
    state_dict: Mapping[str, Tensor], config: GPTConfig, *, source: str, fill_biases: bool = False
) -> dict[str, Tensor]:
    """Check names and shapes of untrusted weights, with matrices as (out, in); returns float32.

    A UserError names `source` and the first tensor that is missing, unknown or misshapen. With
    `fill_biases`, missing biases are zeros.
    """

    def refuse(problem: str) -> NoReturn:
        raise UserError(f"{source}: {problem}")

    if config.n_embd % config.n_head:
        refuse(f"{config.n_embd} channels do not divide into {config.n_head} heads")
    if config.n_layer > len(state_dict):
        refuse(f"{config.n_layer} layers, but only {len(state_dict)} tensors")
    for name, value in state_dict.items():
        if not is_dense_real(value):
            refuse(f"'{printable(name, MAX_NAME)}' is not a dense tensor of real numbers")
    with torch.device("meta"):
        expected = untied_state_dict(GPT(config))
    tensors = dict(state_dict)
    head = tensors.pop(TIED_WEIGHT, None)
    if fill_biases:  # without memory: the configuration is not known to be true yet
        tensors = {n: tensor for n, tensor in expected.items() if n.endswith("bias")} | tensors
    check_shapes(tensors, expected, source)
    validated = {
        name: torch.zeros(t.shape) if t.is_meta else t.detach().float().contiguous().clone()
        for name, t in ((name, tensors[name]) for name in expected)
    }
    if head is not None and not torch.equal(head.float(), validated[WTE]):
        refuse("the output layer differs from the token embedding; GPT-2 ties the two")
    return validated


def check_finite(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError that names `source` and the first tensor with a NaN or Inf.

    Nothing can be done with such a model, and errors later on would not say why.
    """
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            hint = "its training diverged, or it is damaged: take an earlier checkpoint"
            raise UserError(f"{source}: '{name}' holds NaN or Inf: {hint}")


def is_dense_real(value: object) -> bool:
    """Whether an untrusted value is a CPU tensor that can be converted to float32."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def with_eos_token(bundle: ModelBundle) -> tuple[ModelBundle, int]:
    """The model with exactly the ids that other programs know, and the end-of-text id.

    They all require one. Where the tokenizer has none, a padding row of the embedding serves:
    training made it as unlikely as any id that never occurs. Without a padding row, a copy of the
    least likely row is appended. Other padding rows are cut off, since they would be sampled.
    """
    tokenizer, wte = bundle.tokenizer, bundle.state_dict[WTE]
    eos_id = tokenizer.vocab_size if tokenizer.eot_token is None else tokenizer.eot_token
    rows = max(tokenizer.vocab_size, eos_id + 1)
    if rows > len(wte):
        size = tokenizer.vocab_size
        mean_probs = _probe_probabilities(bundle)[..., :size].mean((0, 1))
        wte = torch.cat([wte, wte[None, int(mean_probs.argmin())]])
    config = dataclasses.replace(bundle.config, vocab_size=rows)
    state_dict = {**bundle.state_dict, WTE: wte[:rows].contiguous()}
    return ModelBundle(config, state_dict, tokenizer), eos_id


def unused_row_probability(bundle: ModelBundle) -> float:
    """The highest probability, over some positions, of the padding row that serves as end-of-text.

    Evaluation and sampling here leave that row out; other programs sample it like any id. It is 0
    if the tokenizer has an end-of-text id.
    """
    size = bundle.tokenizer.vocab_size
    if bundle.tokenizer.eot_token is not None or bundle.config.vocab_size == size:
        return 0.0
    return float(_probe_probabilities(bundle)[..., size].max())


@torch.inference_mode()
def _probe_probabilities(bundle: ModelBundle) -> Tensor:
    """(2, T, rows): of the token ids and, if there is one, the first padding row."""
    size = bundle.tokenizer.vocab_size
    logits: Tensor = bundle.build_model()(probe_ids(bundle.config, size))
    return logits[..., : size + 1].softmax(-1)


def probe_ids(config: GPTConfig, vocab_size: int) -> Tensor:
    """Fixed random ids to compare logits on, (2, T)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (2, min(config.block_size, 128)), generator=generator)


@torch.inference_mode()
def logit_difference(
    bundle: ModelBundle, model: Callable[[Tensor], Tensor], vocab_size: int
) -> float:
    """The largest difference of another model's logits to the bundle's, of `vocab_size` ids."""
    ids = probe_ids(bundle.config, vocab_size)
    difference = model(ids) - bundle.build_model()(ids)
    return float(difference[..., :vocab_size].abs().max())
