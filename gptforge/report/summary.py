"""The model summary. Torch's own `print(model)` differs between versions."""

from torch import nn

from gptforge.model import GPT

RULE = "=" * 50
THIN_RULE = "-" * 50


def model_summary(model: GPT) -> str:
    """Parameter counts and module tree of a GPT, as text."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = _count(model)
    lines = [
        RULE,
        "",
        f"Total Parameters: {total:,}",
        f"Trainable Parameters: {trainable:,}",
        f"Non-trainable Parameters: {total - trainable:,}",
        "",
        "Layer Details:",
        THIN_RULE,
    ]
    for name, child in model.named_children():
        lines.append(f"{name}: {type(child).__name__} ({_count(child):,} parameters)")
        if not isinstance(child, nn.ModuleDict):
            continue
        for layer, module in child.items():
            kind = type(module).__name__
            lines.append(f"  └─{layer}: {kind} ({_count(module):,} parameters)")
            if isinstance(module, nn.ModuleList):
                lines.append("    └─Transformer Blocks:")
                lines += [
                    f"      └─Block {index}: ({_count(block):,} parameters)"
                    for index, block in enumerate(module)
                ]
    lines += ["", "Model Architecture:", THIN_RULE, *_tree("", model, depth=0), RULE]
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _tree(label: str, module: nn.Module, *, depth: int) -> list[str]:
    """A module and its children, in the format of torch's `print(model)`."""
    indent = "  " * depth
    children = list(module.named_children())
    if isinstance(module, nn.ModuleList):
        # All blocks are equal, so the first one is shown.
        count = len(module)
        span = f"(0-{count - 1}): {count} x " if count > 1 else "(0): "
        inner = _tree(span, module[0], depth=depth + 1)
    elif not children:
        return [f"{indent}{label}{_describe(module)}"]
    else:
        inner = [
            line
            for name, child in children
            for line in _tree(f"({name}): ", child, depth=depth + 1)
        ]
    return [f"{indent}{label}{type(module).__name__}(", *inner, f"{indent})"]


def _describe(module: nn.Module) -> str:
    match module:
        case nn.Embedding():
            return f"Embedding({module.num_embeddings}, {module.embedding_dim})"
        case nn.Linear():
            sizes = f"in_features={module.in_features}, out_features={module.out_features}"
            return f"Linear({sizes}, bias={module.bias is not None})"
        case nn.LayerNorm():
            shape = tuple(module.normalized_shape)
            return f"LayerNorm({shape}, eps={module.eps}, elementwise_affine=True)"
        case nn.GELU():
            return f"GELU(approximate='{module.approximate}')"
    raise AssertionError(f"the summary cannot describe a {type(module).__name__}")
