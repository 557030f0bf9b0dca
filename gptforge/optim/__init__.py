"""Optimizers and learning-rate schedules."""

from torch import Tensor

from gptforge.model import GPT, Block
from gptforge.optim.adamw import build_adamw
from gptforge.optim.muon import Muon
from gptforge.optim.optimizer import Optimizer


def build_optimizer(
    name: str, model: GPT, *, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """Build AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest.

    Args:
        name: "adamw" or "muon", the value of `--optimizer`.
        model: the model to train.
        betas: of AdamW.
        weight_decay: for matrices and embeddings.
    """
    if name == "adamw":
        return build_adamw(model.parameters(), betas=betas, weight_decay=weight_decay)
    matrices: list[tuple[Tensor, int]] = []
    for block in model.blocks():
        assert isinstance(block, Block)
        # q, k and v are three matrices in one parameter, each orthogonalized separately.
        matrices.append((block.attn.c_attn.weight, 3))
        matrices += [(m.weight, 1) for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    muon_ids = {id(parameter) for parameter, _ in matrices}
    # Muon is for hidden matrices: embeddings, norms and biases stay with AdamW (Jordan).
    rest = (p for p in model.parameters() if id(p) not in muon_ids)
    adamw = build_adamw(rest, betas=betas, weight_decay=weight_decay)
    return Muon(matrices, adamw, weight_decay=weight_decay)
