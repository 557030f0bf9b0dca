"""All gradients of a model in one contiguous buffer, accumulated in place.

With one buffer, zeroing and clipping are one kernel each, and the buckets of an all-reduce are
slices that need no copy (DDP copies gradients into its buckets).
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # in elements: 256 bytes of fp32, the alignment that `kernels.cublaslt` requires


class GradBuffer:
    """One tensor with the gradients of all parameters, in backward order.

    Args:
        groups: parameters whose gradients become ready together, in that order. Parameters of a
            group are contiguous; each group starts at an aligned offset.
        device: of the buffer; by default that of the parameters.
    """

    def __init__(
        self, groups: Sequence[Sequence[Tensor]], *, device: torch.device | str | None = None
    ) -> None:
        sizes = (round_up(sum(map(self._numel, group)), ALIGNMENT) for group in groups)
        self.group_ends = list(itertools.accumulate(sizes))  # offset of the end of each group
        first = groups[0][0]
        device = device or first.device
        self.flat = torch.zeros(self.group_ends[-1], dtype=first.dtype, device=device)
        self._views: dict[Tensor, Tensor] = {}
        for offset, group in zip([0, *self.group_ends], groups, strict=False):
            for parameter in group:
                view = self.flat[offset : offset + parameter.numel()]
                self._views[parameter] = view.view(parameter.shape)
                offset += self._numel(parameter)

    def view(self, parameter: Tensor) -> Tensor:
        """Return the part of the buffer that accumulates a parameter's gradient."""
        return self._views[parameter]

    def contiguous_view(self, *parameters: Tensor) -> Tensor:
        """Return one flat view over adjacent parameters of a group."""
        views = [self._views[p] for p in parameters]
        start, numel = views[0].storage_offset(), sum(p.numel() for p in parameters)
        assert views[-1].storage_offset() + views[-1].numel() == start + numel
        return self.flat[start : start + numel]

    def zero_(self) -> None:
        """Set all gradients to zero, and assign them to the parameters."""
        self.flat.zero_()
        self.assign_grads()

    def assign_grads(self) -> None:
        """Set each parameter's `grad` to its view, for the optimizer."""
        for parameter, grad in self._optimizer_grads.items():
            parameter.grad = grad

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global norm to `max_norm`; returns the norm before clipping."""
        # Padding between groups is zero, so it does not count.
        norm: Tensor = torch.linalg.vector_norm(self.flat)
        # `flat.mul_` with a scalar on the device runs a kernel that torch does not vectorize.
        torch._foreach_mul_([self.flat], clip_coef(norm, max_norm))
        return norm

    def _numel(self, parameter: Tensor) -> int:
        """Elements that a parameter's gradient takes in the buffer."""
        return parameter.numel()

    @functools.cached_property
    def _optimizer_grads(self) -> dict[Tensor, Tensor]:
        """Tensors that become the `grad` of each parameter."""
        return self._views


class AutogradGradBuffer(GradBuffer):
    """A `GradBuffer` that autograd accumulates into, with one parameter per group.

    Args:
        parameters: each gets a hook that reports its gradient; hooks are not removed.
    """

    on_grads_ready: Callable[[int], None]
    """Called with the number of leading groups that are final for this micro-batch."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__([[p] for p in parameters])
        self.start_micro_batch()
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(functools.partial(self._on_grad, i))

    def start_micro_batch(self) -> None:
        """Forget which gradients were ready in the previous micro-batch."""
        self._num_ready = 0
        self._is_ready = [False] * len(self.group_ends)

    def _on_grad(self, i: int, _: Tensor) -> None:
        self._is_ready[i] = True
        # Gradients may become ready out of order; only a prefix can be sent, since all ranks must
        # reduce the same buckets in the same order.
        while self._num_ready < len(self._is_ready) and self._is_ready[self._num_ready]:
            self._num_ready += 1
        self.on_grads_ready(self._num_ready)


def round_up(count: int, multiple: int) -> int:
    """Round up to the next multiple."""
    return -(-count // multiple) * multiple


def clip_coef(total_norm: Tensor, max_norm: float) -> Tensor:
    """Factor that scales gradients to `max_norm`, as torch's clip_grad_norm_ computes it.

    The result stays on the device: no sync for the norm.
    """
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
