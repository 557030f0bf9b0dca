"""Which kernels and which backward to train with: the fastest that were measured per device."""

from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from gptforge.config import Config
from gptforge.device import Precision
from gptforge.errors import UserError


@dataclass(frozen=True)
class KernelConfig:
    """How a training step is computed; the default is plain autograd."""

    manual_backward: bool = False
    """Use the manual backward of training/backends/manual.py instead of autograd."""
    fused_cross_entropy: bool = False
    """Fuse the output layer with the loss, see kernels/cross_entropy.py."""
    residual_dtype: torch.dtype | None = None
    """Dtype of the residual; None: float32."""
    float8: bool = False
    """With the manual backward: matmuls in fp8, see training/backends/float8.py."""


DEFAULT_KERNELS = KernelConfig()


def select_kernels(config: Config, device: torch.device, precision: Precision) -> KernelConfig:
    """Select the fastest kernels measured on this kind of device, before any of them is tried.

    Raises:
        UserError: for fp8 with an option that the manual backward does not have.
    """
    is_bf16 = precision.dtype == torch.bfloat16
    residual_dtype = torch.bfloat16 if is_bf16 else None
    if device.type == "cpu" and (is_bf16 or precision.dtype == torch.float32):
        return KernelConfig(fused_cross_entropy=True, residual_dtype=residual_dtype)
    if not is_bf16 or device.type != "cuda" or torch.version.hip:
        return DEFAULT_KERNELS
    # cuBLASLt fuses only the tanh form of GELU into a matmul.
    manual_backward = (
        config.compile != "true"
        and not (config.dropout and config.activation_checkpointing)
        and config.activation == "gelu_tanh"
    )
    if precision.float8 and not manual_backward:
        raise UserError(
            "--dtype fp8 does not work with --compile true, with --activation gelu, or with "
            "both --dropout and --activation_checkpointing: use --dtype bfloat16"
        )
    return KernelConfig(
        manual_backward=manual_backward,
        fused_cross_entropy=True,
        residual_dtype=residual_dtype,
        float8=precision.float8,
    )


def sdpa_backend(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """The SDPA backend torch selects for this model: flash, cudnn, efficient, math or unknown."""
    shape = (1, config.n_head, config.context_length, config.n_embd // config.n_head)
    q = torch.zeros(shape, device=device, dtype=dtype)
    try:
        kind = SDPBackend(torch._fused_sdp_choice(q, q, q, None, 0.0, True))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return "unknown"
    # A number that this torch does not know is called "???".
    known = kind.name in SDPBackend.__members__
    return kind.name.removesuffix("_ATTENTION").lower() if known else "unknown"
