"""The optimizer that `--optimizer` names."""

from torch import Tensor

from gptforge.model import GPT, Block
from gptforge.optim.adamw import adamw_from_parameters, build_adamw
from gptforge.optim.muon import Muon
from gptforge.optim.optimizer import Optimizer


def build_optimizer(
    name: str, model: GPT, *, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """AdamW over all parameters, or Muon over the blocks' matrices and AdamW over the rest."""
    if name == "adamw":
        return build_adamw(model, betas=betas, weight_decay=weight_decay)
    matrices: list[tuple[Tensor, int]] = []
    for block in model.blocks():
        assert isinstance(block, Block)
        # q, k and v are three maps in one matrix.
        matrices.append((block.attn.c_attn.weight, 3))
        matrices += [(m.weight, 1) for m in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
    taken = {id(parameter) for parameter, _ in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    rest = adamw_from_parameters(others, betas=betas, weight_decay=weight_decay)
    return Muon(matrices, rest, weight_decay=weight_decay)
