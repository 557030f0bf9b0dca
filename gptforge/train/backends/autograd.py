"""Loss and gradients of a GPT by autograd: on any device, with dropout, compiled or not."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptforge.device import Precision, autocast
from gptforge.kernel_select import KernelConfig
from gptforge.kernels.cross_entropy import fused_linear_cross_entropy
from gptforge.model import GPT, IGNORE_INDEX
from gptforge.train.parallel.fsdp import FSDPRoot, clip_grad_norm_
from gptforge.train.parallel.grad_reducer import LooseGrads
from gptforge.train.savings import DEFAULT_SAVINGS, Savings


class AutogradBackend:
    """The plain way, but for the kernels that are chosen; the same calls as `ByHand`.

    Args:
        model: whose parameters get the gradients.
        precision: type of the matrix products.
        kernels: which of ours to use in between.
        scaler: of the loss, for float16.
        savings: what to make again in the backward pass.
        gradients: where they go.
        root: what a sharded model is called through; it has narrow weights of its own, and averages
            gradients over `size` ranks.
        by_block: compile each block by itself: gradients of the last are there while those of the
            first are made, and shards are fetched block by block.
    """

    def __init__(
        self,
        model: GPT,
        precision: Precision,
        kernels: KernelConfig,
        *,
        scaler: torch.amp.GradScaler,
        savings: Savings = DEFAULT_SAVINGS,
        gradients: LooseGrads | None = None,
        root: FSDPRoot | None = None,
        world_size: int = 1,
        compile_blocks: bool = False,
    ) -> None:
        self.model, self._precision, self._kernels = model, precision, kernels
        self._scaler, self._savings = scaler, savings
        self._gradients = gradients or LooseGrads()
        self._by_block = compile_blocks
        self._root, self._factor = root, world_size if root else 1
        self._device = next(model.parameters()).device
        self._is_apart = kernels.fused_cross_entropy or savings.loss_chunk > 0
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._whole
        if self._is_apart:
            self._forward = self._with_head_apart(self._hidden)
        for block in model.blocks():
            block.__dict__.pop("forward", None)

    def compile(self) -> None:
        """Run the model compiled from now on. The saved weights' names stay those of the module."""
        if self._by_block:
            for block in self.model.blocks():
                block.forward = _compiled(block)
        elif self._is_apart:
            self._forward = self._with_head_apart(torch.compile(self._hidden, dynamic=False))
        else:
            self._forward = torch.compile(self._whole, dynamic=False)

    def zero_grad(self) -> None:
        """Before the first micro-batch of an update."""
        self._gradients.zero_()

    def __call__(self, idx: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `ByHand.__call__`."""
        self._gradients.begin()
        if self._root is not None:
            self._root.train_forward = self._forward
            loss: Tensor = self._root(idx, targets)
        else:
            with autocast(self._device, self._precision):
                loss = self._forward(idx, targets)
        self._scaler.scale(loss * (scale * self._factor)).backward()
        return loss.detach()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Shorten the gradients if their norm is above `longest`; the norm before that."""
        if self._root is not None:
            return clip_grad_norm_(self.model, max_norm)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def _hidden(self, x: Tensor) -> Tensor:
        return self.model.forward_hidden(
            x,
            self._kernels.residual_dtype,
            activation_checkpointing=self._savings.activation_checkpointing,
        )

    def _whole(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model.loss(self._hidden(x), y)

    def _with_head_apart(
        self, hidden: Callable[[Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        chunk = self._savings.loss_chunk

        def loss(x: Tensor, y: Tensor) -> Tensor:
            h, targets = hidden(x).flatten(0, 1), y.flatten()
            if not chunk:
                return self._head(h, targets)
            pieces = zip(h.split(chunk), targets.split(chunk), strict=True)
            losses = [checkpoint(self._head, *piece, use_reentrant=False) for piece in pieces]
            return torch.stack(losses).sum()

        return loss

    def _head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self._kernels.fused_cross_entropy:
            table = self.model.lm_head.weight
            return fused_linear_cross_entropy(
                hidden.to(self._precision.dtype), table, targets, IGNORE_INDEX
            )
        return self.model.loss(hidden, targets)


def _compiled(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """A block's way forward, compiled for training: an evaluation has batches of other shapes.

    All blocks are alike to the compiler, so that it compiles one of them.
    """
    plain = block.forward
    fast = torch.compile(plain, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = (fast if block.training else plain)(x)
        return y

    return forward
