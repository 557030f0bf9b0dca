"""The model summary."""

import re

from torch import nn

from gptforge.model import GPT

RULE = "=" * 50
THIN_RULE = "-" * 50


def model_summary(model: GPT) -> str:
    """Parameter counts and module tree of a GPT, as text."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = _count(model)
    lines = [
        f"{RULE}\n\nTotal Parameters: {total:,}",
        f"Trainable Parameters: {trainable:,}",
        f"Non-trainable Parameters: {total - trainable:,}",
        f"\nLayer Details:\n{THIN_RULE}",
    ]
    for name, child in model.named_children():
        lines.append(f"{name}: {type(child).__name__} ({_count(child):,} parameters)")
        for layer, module in child.items() if isinstance(child, nn.ModuleDict) else ():
            kind = type(module).__name__
            lines.append(f"  └─{layer}: {kind} ({_count(module):,} parameters)")
            if isinstance(module, nn.ModuleList):
                lines.append("    └─Transformer Blocks:")
                for index, block in enumerate(module):
                    lines.append(f"      └─Block {index}: ({_count(block):,} parameters)")
    # Later versions of torch add whether a LayerNorm has a bias.
    tree = re.sub(r"(LayerNorm\(.*), bias=True\)", r"\1)", repr(model))
    lines += ["", "Model Architecture:", THIN_RULE, tree, RULE]
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
