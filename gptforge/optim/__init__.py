"""Optimizers and learning-rate schedules."""

import functools

from torch import Tensor

from gptforge.model import GPT, Block
from gptforge.optim.adamw import build_adamw
from gptforge.optim.muon import Muon
from gptforge.optim.optimizer import Optimizer


def build_optimizer(
    name: str,
    model: GPT,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    embedding_weight_decay: float | None = None,
    muon_weight_decay: float | None = None,
    muon_lr_scale: float = 1.0,
) -> Optimizer:
    """Build AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest.

    Args:
        name: "adamw" or "muon", the value of `--optimizer`.
        model: the model to train.
        betas: of AdamW.
        weight_decay: for matrices and embeddings.
        embedding_weight_decay: for the embeddings, if it differs.
        muon_weight_decay: for the matrices that Muon trains, if it differs.
        muon_lr_scale: learning rate of these matrices, as a multiple of AdamW's.
    """
    embeddings = [p for name, p in model.named_parameters() if ".wte." in name or ".wpe." in name]
    make_adamw = functools.partial(
        build_adamw,
        betas=betas,
        weight_decay=weight_decay,
        embeddings=embeddings,
        embedding_weight_decay=embedding_weight_decay,
    )
    if name == "adamw":
        return make_adamw(model.parameters())
    matrices: list[tuple[Tensor, int]] = []
    for block in model.blocks():
        assert isinstance(block, Block)
        # q, k and v are three matrices in one parameter, each orthogonalized separately.
        matrices.append((block.attn.c_attn.weight, 3))
        matrices += [(m.weight, 1) for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    muon_ids = {id(parameter) for parameter, _ in matrices}
    # Muon is for hidden matrices: embeddings, norms and biases stay with AdamW (Jordan).
    rest = (p for p in model.parameters() if id(p) not in muon_ids)
    decay = weight_decay if muon_weight_decay is None else muon_weight_decay
    return Muon(matrices, make_adamw(rest), weight_decay=decay, lr_scale=muon_lr_scale)
