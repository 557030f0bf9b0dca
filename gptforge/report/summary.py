"""The model summary, drawn by our own code: torch's own print changes between versions."""

from torch import nn

from gptforge.model import GPT, Block

RULE = "=" * 50
THIN_RULE = "-" * 50


def model_summary(model: GPT) -> str:
    """Parameter counts and architecture of a GPT, as text."""
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
        if isinstance(child, nn.ModuleDict):
            for inner_name, inner in child.items():
                lines += _layer_lines(inner_name, inner)
    lines += ["", "Model Architecture:", THIN_RULE, *_tree("", model, depth=0), RULE]
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _layer_lines(name: str, module: nn.Module) -> list[str]:
    lines = [f"  └─{name}: {type(module).__name__} ({_count(module):,} parameters)"]
    if isinstance(module, nn.ModuleList):
        lines.append("    └─Transformer Blocks:")
        lines += [
            f"      └─Block {index}: ({_count(block):,} parameters)"
            for index, block in enumerate(module)
        ]
    return lines


def _tree(label: str, module: nn.Module, *, depth: int) -> list[str]:
    """A module and its children, in the form that torch prints them."""
    indent = "  " * depth
    children = list(module.named_children())
    if isinstance(module, nn.ModuleList):
        # The blocks are all alike: one stands for all.
        blocks = list(module)
        span = f"(0-{len(blocks) - 1}): {len(blocks)} x " if len(blocks) > 1 else "(0): "
        inner = _tree(span, blocks[0], depth=depth + 1)
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
    raise AssertionError(f"the summary does not know {type(module).__name__} in a {Block.__name__}")
