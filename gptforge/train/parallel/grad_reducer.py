"""Gradients added up over the ranks, while the backward pass is still making the rest of them.

All gradients lie in one piece of memory, in the order in which they are made. What has nothing more
to come is sent in pieces of some megabytes, in the last micro-batch of an update only.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gptforge.distributed import Comm
from gptforge.train.grad_buffer import GradBuffer

BUCKET_BYTES = 25 * 2**20
"""Bytes: smaller messages leave the wires idle, larger ones wait long to set out."""


class GradReducer:
    """One process has nobody to add up with."""

    world_size = 1

    def reset(self) -> None:
        """An update begins, or begins anew because memory ran out before anything was sent."""

    def enable_sync(self) -> None:
        """The last micro-batch of an update comes next."""

    def grads_ready(self, groups: int) -> None:
        """So many groups have nothing more to come: send them, if it is the last micro-batch."""

    def has_sent(self) -> bool:
        """Whether anything was sent in this update."""
        return False

    def poison(self) -> None:
        """Send what is left as no numbers: the update is then left out on every rank."""

    def finish(self, loss: Tensor) -> Tensor:
        """Wait for all that was sent; gives the sum of the ranks' losses."""
        return loss


class BucketedAllReduce(GradReducer):
    """Several processes, each with gradients of its own part of the batch.

    Args:
        ranks: who adds up.
        gradients: where they lie.
    """

    def __init__(self, ranks: Comm, gradients: GradBuffer) -> None:
        self.world_size = ranks.world_size
        self._ranks, self._gradients = ranks, gradients
        least = BUCKET_BYTES // gradients.flat.element_size()
        # The same on all ranks, or they would add up different things.
        self._pieces = make_buckets(gradients.group_ends, least)
        self._sent = 0
        self._is_armed = False
        self._waits: list[Callable[[], None]] = []

    def reset(self) -> None:
        """As `GradientSync.begin`."""
        self._is_armed = False

    def enable_sync(self) -> None:
        """As `GradientSync.arm`."""
        self._is_armed = True

    def grads_ready(self, groups: int) -> None:
        """As `GradientSync.made`."""
        if self._is_armed and groups:
            self._send(self._gradients.group_ends[groups - 1])

    def has_sent(self) -> bool:
        """As `GradientSync.has_begun`."""
        return self._sent > 0

    def poison(self) -> None:
        """As `GradientSync.give_up`."""
        if self._sent < len(self._pieces):
            self._gradients.flat[self._pieces[self._sent][0] :].fill_(math.nan)

    def finish(self, loss: Tensor) -> Tensor:
        """As `GradientSync.finish`."""
        self._send(self._gradients.group_ends[-1])
        self._ranks.all_reduce(loss)
        for wait in self._waits:
            wait()
        self._waits.clear()
        self._sent = 0
        # A rehearsal between updates sends nothing.
        self._is_armed = False
        return loss

    def _send(self, end: int) -> None:
        while self._sent < len(self._pieces) and self._pieces[self._sent][1] <= end:
            self._waits.append(self._begin(*self._pieces[self._sent]))
            self._sent += 1

    def _begin(self, start: int, stop: int) -> Callable[[], None]:
        return self._ranks.all_reduce_async(self._gradients.flat[start:stop])


class LooseGrads:
    """Gradients wherever autograd puts them: what one process needs."""

    def zero_(self) -> None:
        """Before an update."""

    def begin(self) -> None:
        """Before a micro-batch."""


class AutogradGradBuffer(GradBuffer, LooseGrads):
    """Gradients that autograd makes, in one piece of memory.

    `made` hears of them as `ByHand.made` does, a group a parameter.

    Args:
        model: whose gradients. They are made from the last layer to the first, and the token
            table's last of all: it is the first layer, too.
    """

    on_grads_ready: Callable[[int], None]

    def __init__(self, model: nn.Module) -> None:
        order = _in_order(list(model.named_parameters()))
        super().__init__([[p] for p in order])
        self._count = 0
        self._done = [False] * len(order)
        for place, parameter in enumerate(order):
            parameter.register_post_accumulate_grad_hook(self._hook(place))

    def begin(self) -> None:
        """As `LooseGradients.begin`: none of this micro-batch's are made yet."""
        self._count = 0
        self._done = [False] * len(self._done)

    def _hook(self, place: int) -> Callable[[Tensor], None]:
        def heard(_: Tensor) -> None:
            self._done[place] = True
            while self._count < len(self._done) and self._done[self._count]:
                self._count += 1
            self.on_grads_ready(self._count)

        return heard


def _in_order(named: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """Parameters in the order in which a backward pass is done with them."""
    tables = [p for name, p in named if ".wte." in name or ".wpe." in name]
    return [p for _, p in reversed(named) if not any(p is t for t in tables)] + tables[::-1]


def make_buckets(ends: Sequence[int], min_size: int) -> list[tuple[int, int]]:
    """Neighbouring pieces of one row, put together until each is at least so long, but the last.

    Args:
        ends: where the pieces end, in order.
        least: shortest that is worth a message of its own.
    """
    found, start = [], 0
    for end in ends:
        if end - start >= min_size or (end == ends[-1] and end > start):
            found.append((start, end))
            start = end
    return found
