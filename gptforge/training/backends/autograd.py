"""Loss and gradients of a GPT by autograd: on any device, with any option, compiled or not."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptforge.device import Precision, autocast
from gptforge.distributed.dtensor import is_sharded
from gptforge.kernel_select import KernelConfig
from gptforge.kernels.cross_entropy import fused_linear_cross_entropy
from gptforge.model import GPT
from gptforge.training.distillation import Distillation
from gptforge.training.grad_buffer import AutogradGradBuffer
from gptforge.training.parallel.fsdp import FSDPRoot


class AutogradBackend:
    """The reference backend. See `TrainStep` for arguments not listed here.

    Args:
        grads: buffer that gradients accumulate in, if several ranks reduce it.
        root: the root module, if FSDP shards the model: FSDP casts the weights, and averages
            gradients over `world_size` ranks.
        world_size: ranks that train together.
    """

    name = "autograd"

    def __init__(
        self,
        model: GPT,
        precision: Precision,
        kernels: KernelConfig,
        *,
        scaler: torch.amp.GradScaler,
        activation_checkpointing: bool = False,
        loss_chunk: int = 0,
        grads: AutogradGradBuffer | None = None,
        root: FSDPRoot | None = None,
        world_size: int = 1,
        distillation: Distillation | None = None,
    ) -> None:
        assert root is None or distillation is None, "teachers are not sharded"
        self._distillation = distillation
        self.model, self._precision, self._kernels = model, precision, kernels
        self._scaler, self._grads, self._root = scaler, grads, root
        if root is not None:
            root.train_forward = self._loss
        self._activation_checkpointing = activation_checkpointing
        self._loss_chunk = loss_chunk
        # One graph of the full model would finish all gradients at its end, with nothing left to
        # overlap their reduction with; and FSDP gathers weights block by block.
        self._compile_blocks = world_size > 1
        # FSDP averages over the ranks; `scale` already divides by the tokens of all of them.
        self._grad_factor = world_size if root else 1
        self._device = next(model.parameters()).device
        for block in model.blocks():
            # An earlier backend may have compiled the same block.
            block.__dict__.pop("forward", None)

    def compile(self) -> None:
        """Compile the model. Parameters keep the names of the plain module."""
        # Instance attributes that shadow methods; the state dict gets no "_orig_mod".
        if self._compile_blocks:
            for block in self.model.blocks():
                block.__dict__["forward"] = _compile_for_training(block)
        elif self._kernels.fused_cross_entropy or self._loss_chunk or self._distillation:
            # Output layer and loss stay eager.
            self._hidden = torch.compile(self._hidden, dynamic=False)  # type: ignore[method-assign]
        else:
            self._loss = torch.compile(self._loss, dynamic=False)  # type: ignore[method-assign]

    def set_dropout(self, p: float) -> None:
        """Change the dropout probability."""
        self.model.set_dropout(p)

    def zero_grad(self) -> None:
        """Start a step."""
        if self._grads is not None:
            self._grads.zero_()

    def forward_backward(self, idx: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Return a micro-batch's loss, and accumulate gradients; see `ManualBackend`."""
        if self._grads is not None:
            self._grads.start_micro_batch()
        if self._root is not None:
            loss: Tensor = self._root(idx, targets)
            train_loss = loss
        else:
            with autocast(self._device, self._precision):
                loss, train_loss = self._losses(idx, targets)
        self._scaler.scale(train_loss * (scale * self._grad_factor)).backward()
        return loss.detach()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients down to `max_norm`; returns the norm before that."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        # Under FSDP a DTensor: the norms of the shards, which `full_tensor` reduces over the ranks.
        return norm.full_tensor() if is_sharded(norm) else norm

    def _losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy of the targets, and the loss to train with: the same, or distillation.

        Both are summed.
        """
        if self._distillation is None:
            loss = self._loss(idx, targets)
            return loss, loss
        hidden = self._hidden(idx)
        loss = self._head_loss(hidden, targets)
        return loss, self._distillation.loss(self.model.lm_head(hidden), idx, targets, loss)

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self._head_loss(self._hidden(idx), targets)

    def _hidden(self, idx: Tensor) -> Tensor:
        return self.model.forward_hidden(
            idx,
            self._kernels.residual_dtype,
            activation_checkpointing=self._activation_checkpointing,
        )

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Output layer and summed cross-entropy, from hidden states (B, T, C)."""
        if not self._loss_chunk:
            return self._chunk_loss(hidden, targets)
        # Checkpointing frees each chunk's logits, the largest tensor, and recomputes them in the
        # backward: one more GEMM for 1 / num_chunks of the memory.
        hidden_chunks = hidden.flatten(0, 1).split(self._loss_chunk)
        chunks = zip(hidden_chunks, targets.flatten().split(self._loss_chunk), strict=True)
        losses = [checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if not self._kernels.fused_cross_entropy:
            return self.model.loss(hidden, targets)
        hidden = hidden.flatten(0, -2).to(self._precision.dtype)
        weight = self.model.lm_head.weight
        return fused_linear_cross_entropy(hidden, weight, targets.flatten())


def _compile_for_training(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """Compile a block's forward for training only: evaluation batches have other shapes.

    The code is compiled once, since Dynamo's guards hold for all blocks.
    """
    plain = block.forward
    compiled = torch.compile(plain, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = (compiled if block.training else plain)(x)
        return y

    return forward
