"""The products on both sides of the MLP's GELU, with their way back called by hand.

Two ways: cuBLASLt's, which has the GELU and its slope in some products, with passes of our own for
the rest; or those of quack (Dao et al., the package quack-kernels), which also add up the gradient
of the bias, and make the GELU again, while they multiply. On an H100 these take 242 us instead of
288 forward, and 331 or 388 instead of 386 or 513 back, for 32,768 tokens of GPT-2 small.

Shapes: N tokens, C channels, F channels of the MLP inside.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.matmul import linear_dgrad, linear_dgrad_dgelu, linear_gelu
from gptforge.kernels.reductions import (
    PendingReductions,
    accumulate_column_sums,
    accumulate_partials,
)

TILES = {
    "forward": (128, 192, 2, 1),
    "back": (128, 192, 2, 1),
    "back, GELU again": (128, 128, 1, 2),
}
"""Rows and columns of a tile, and tiles of a cluster: quack's fastest settings on an H100."""


class GeluProducts(Protocol):
    """Both ways through the GELU."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """x @ weight.T + bias and the GELU of that: (N, C) and (F, C) to two (N, F)."""

    def backward(
        self,
        upstream: Tensor,
        weight: Tensor,
        inner: Tensor,
        activated: Tensor | None,
        sums: Tensor,
        unfinished: PendingReductions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """From behind the layer that follows the GELU to before the GELU.

        Args:
            upstream: (N, C) gradient of what that layer gives.
            weight: (C, F) of that layer.
            inner: (N, F) what went into the GELU; it may be written over.
            activated: (N, F) what came out; None has it made again.
            sums: (F,) float32, grows by the gradient's sum over the tokens.
            unfinished: where that may wait, until the next way back, if it may.

        Returns:
            The gradient of `inner`, and what came out of the GELU: two (N, F).
        """


class ByCublas:
    """cuBLASLt on a CUDA device, torch elsewhere; see products.py.

    Args:
        slope_apart: whether a pass of its own takes the slope, with the sums for the bias, where
            the GELU was kept; otherwise the product takes it, and a pass makes the sums.
    """

    def __init__(self, *, slope_apart: bool) -> None:
        self._slope_apart = slope_apart

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """As `GeluProducts.forward`."""
        return linear_gelu(x, weight, bias)

    def backward(
        self,
        upstream: Tensor,
        weight: Tensor,
        inner: Tensor,
        activated: Tensor | None,
        sums: Tensor,
        unfinished: PendingReductions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `GeluProducts.backward`."""
        if activated is None:
            return gelu_backward(
                inner, linear_dgrad(upstream, weight), sums, unfinished, recompute=True
            )
        if self._slope_apart:
            wide, _ = gelu_backward(
                inner, linear_dgrad(upstream, weight), sums, unfinished, recompute=False
            )
            return wide, activated
        wide = linear_dgrad_dgelu(upstream, weight, inner)
        accumulate_column_sums(wide, sums, unfinished)
        return wide, activated


class ByQuack:
    """quack's products; bfloat16 on Hopper GPUs."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """As `GeluProducts.forward`."""
        inner = x.new_empty(len(x), len(weight))
        activated = torch.empty_like(inner)
        out = {"D": inner, "mAuxOut": activated}
        _quack().run("forward", x, weight.t(), None, out, mRowVecBroadcast=bias)
        return inner, activated

    def backward(
        self,
        upstream: Tensor,
        weight: Tensor,
        inner: Tensor,
        activated: Tensor | None,
        sums: Tensor,
        unfinished: PendingReductions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `GeluProducts.backward`."""
        wide = torch.empty_like(inner)
        if activated is None:
            # In the place of what is read: each tile by the program that writes it.
            out = {"D": wide, "postact": inner}
            parts = _quack().run("back, GELU again", upstream, weight, inner, out)
            activated = inner
        else:
            parts = _quack().run("back", upstream, weight, inner, {"D": wide})
        accumulate_partials(parts, sums, unfinished)
        return wide, activated


class _Quack:
    """The package's products, and the plans that were made of them."""

    def __init__(self) -> None:
        from quack.epilogue import library
        from quack.gemm_config import GemmConfig

        self._products = {
            "forward": library.linear_act_mod(
                "gelu_tanh_approx", gated=False, has_c=False, has_rowvec=True, has_colvec=False
            ),
            "back": library.dgelu_dbias_epi,
            "back, GELU again": library.dgelu_dbias_mod,
        }
        # Its own search for settings takes minutes.
        self._configs = {
            name: GemmConfig(
                tile_m=rows, tile_n=columns, cluster_m=high, cluster_n=wide, pingpong=True,
                swap_ab=False, device_capacity=9, is_dynamic_persistent=False,
            )
            for name, (rows, columns, high, wide) in TILES.items()
        }  # fmt: skip
        self._plans: dict[tuple[object, ...], Any] = {}

    def run(
        self,
        name: str,
        left: Tensor,
        right: Tensor,
        beside: Tensor | None,
        out: dict[str, Tensor],
        **more: Tensor,
    ) -> Tensor:
        """Compute a product into `out`; gives sums over the rows, in parts, if it makes them.

        Args:
            name: of the product.
            left: (N, K), row by row.
            right: (K, M), either way round.
            beside: (N, M) that the result is changed by, or None.
            out: tensors by quack's names.
            more: operands by quack's names.

        Returns:
            (P, M) float32, good until the next run of the same product.
        """
        key = (name, left.device, left.shape, right.shape, right.stride())
        product, plan = self._products[name], self._plans.get(key)
        if plan is None:
            plan = product.plan(left, right, beside, out=out, config=self._configs[name], **more)
            self._plans[key] = plan
        plan.run(left, right, beside, out=out, **more)
        scratch: dict[str, Tensor] = plan.scratch
        return next(iter(scratch.values()), left.new_empty(0))


def why_not_quack(device: torch.device, dtype: torch.dtype) -> str:
    """What speaks against quack's products here; empty if nothing does."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "they were tried on Hopper GPUs only"
    if dtype != torch.bfloat16:
        return "they want bfloat16"
    try:
        is_here = importlib.util.find_spec("quack.epilogue") is not None
    except ImportError:
        is_here = False
    return "" if is_here else "the package quack-kernels is not installed"


def prepare_quack(cache_folder: Path) -> None:
    """Import quack, which compiles its kernels when they are first planned: seconds.

    Raises:
        Exception: whatever the package and its compiler raise where they do not fit each other.
    """
    os.environ.setdefault("QUACK_CACHE_DIR", str(cache_folder / "quack"))
    _quack()


@cache
def _quack() -> _Quack:
    return _Quack()
