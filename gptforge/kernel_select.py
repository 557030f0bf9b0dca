"""TODO"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from gptforge.device import Precision


@dataclass(frozen=True)
class KernelConfig:
    """How an update is computed where there is a choice; the plain way unless said otherwise."""

    manual_backward: bool = False
    """Forward and backward written out, see train/by_hand.py."""
    fused_cross_entropy: bool = False
    """The output layer and its loss in one, see kernels/head.py."""
    quack: bool = False
    """The MLP's products by quack, where an update is written out."""
    residual_dtype: torch.dtype | None = None
    """Type of the residual stream, float32 where none is given."""


DEFAULT_KERNELS = KernelConfig()


def select_kernels(
    device: torch.device,
    precision: Precision,
    *,
    compile_flag: str = "auto",
    dropout: float = 0.0,
    activation_checkpointing: bool = False,
    activation: str = "gelu_tanh",
) -> KernelConfig:
    """The fastest that were measured on this kind of device."""
    narrow = precision.dtype == torch.bfloat16
    if device.type == "cpu" and (narrow or precision.dtype == torch.float32):
        return KernelConfig(
            fused_cross_entropy=True, residual_dtype=torch.bfloat16 if narrow else None
        )
    if not narrow or device.type != "cuda" or torch.version.hip:
        return DEFAULT_KERNELS
    # The products with a GELU inside have the tanh form only.
    by_hand = (
        compile_flag != "true"
        and not (dropout and activation_checkpointing)
        and activation == "gelu_tanh"
    )
    return KernelConfig(
        manual_backward=by_hand, fused_cross_entropy=True, residual_dtype=torch.bfloat16
    )


def try_compile(flag: str, device: torch.device, attempt: Callable[[], None]) -> tuple[bool, str]:
    """Whether to compile, and why: `attempt` runs the compiled model once and may raise.

    The compiler leans on Triton, a C++ compiler and the driver; where one is missing or too old
    it raises whatever it likes. Training goes on without it then.
    """
    if flag == "false":
        return False, "as asked"
    if flag == "auto" and device.type != "cuda":
        return False, f"takes longer than it saves on {device.type}"
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return False, f"it failed here: {first_line(error)}"
    return True, "as asked" if flag == "true" else "faster after the first step"


def first_line(error: Exception) -> str:
    """What an error of the compiler's, which can be pages long, begins with."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def sdpa_backend(
    device: torch.device, dtype: torch.dtype, *, n_head: int, head_size: int, context_length: int
) -> str:
    """Which of its attention kernels torch picks for this shape: flash, cudnn, efficient, math."""
    q = torch.zeros(1, n_head, context_length, head_size, device=device, dtype=dtype)
    try:
        choice = torch._fused_sdp_choice(q, q, q, None, 0.0, True)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return "unknown"
    names = {int(kind): name for name, kind in SDPBackend.__members__.items()}  # type: ignore[call-overload]
    return names.get(int(choice), "unknown").removesuffix("_ATTENTION").lower()
