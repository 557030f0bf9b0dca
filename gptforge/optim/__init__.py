"""Optimizers and learning-rate schedules."""

import functools

import torch
from torch import Tensor

from gptforge.config import Config
from gptforge.device import select_precision
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from gptforge.optim.muon import Muon
from gptforge.optim.optimizer import Optimizer


def build_optimizer(config: Config, model: GPT) -> Optimizer:
    """AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest."""
    c = config
    embeddings = [p for name, p in model.named_parameters() if ".wte." in name or ".wpe." in name]
    make_adamw = functools.partial(
        build_adamw,
        betas=(c.beta1, c.beta2),
        weight_decay=c.weight_decay,
        embeddings=embeddings if c.embedding_weight_decay >= 0 else (),
        embedding_weight_decay=c.embedding_weight_decay,
    )
    if c.optimizer == "adamw":
        return make_adamw(model.parameters())
    matrices: list[tuple[Tensor, int]] = []
    for block in model.blocks():
        # q, k and v are three matrices in one parameter, each orthogonalized separately.
        matrices.append((block.attn.c_attn.weight, 3))
        matrices += [(m.weight, 1) for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    muon_ids = {id(parameter) for parameter, _ in matrices}
    # Muon is for hidden matrices: embeddings, norms and biases stay with AdamW (Jordan).
    rest = (p for p in model.parameters() if id(p) not in muon_ids)
    decay = c.weight_decay if c.muon_weight_decay < 0 else c.muon_weight_decay
    lr_scale = c.muon_lr / c.max_lr if c.muon_lr else 1.0
    # Where bfloat16 is not native it is emulated: on a CPU, matmuls then take thirty times as long.
    native = select_precision("auto", matrices[0][0].device).dtype
    dtype = torch.bfloat16 if native == torch.bfloat16 else torch.float32
    return Muon(matrices, make_adamw(rest), weight_decay=decay, lr_scale=lr_scale, dtype=dtype)
