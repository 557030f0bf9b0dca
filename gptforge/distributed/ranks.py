"""A process among those that train together: its number, and what all of them do at once.

`Ranks` itself is a process on its own, for which nothing is to be done. Whatever is called here has
to be called by all ranks, in the same order; nothing of it waits for a GPU unless it says so.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from gptforge.distributed.heartbeat import Heartbeat
from gptforge.errors import UserError

if TYPE_CHECKING:
    # Half a second to load: for those who shard.
    from torch.distributed.device_mesh import DeviceMesh

WAIT = timedelta(seconds=60)
"""A wait for another rank's value in the store is begun anew after so long."""


class Ranks:
    """One process."""

    rank = 0
    size = 1
    where = ""
    """Rank and host, for messages."""

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, prints and decides."""
        return self.rank == 0

    @property
    def local_device(self) -> str:
        """As `--device` names the one that this rank was given; empty where it may choose."""
        return ""

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, the same bits on all; returns it."""
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin such a sum beside the computation; the tensor is whole behind the call returned."""
        return _nothing

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor, of which every rank has as many."""
        each = len(tensor) // self.size
        return tensor[self.rank * each : (self.rank + 1) * each]

    def begin_sum_to_own(self, tensor: Tensor) -> Callable[[], None]:
        """Begin a sum of which each rank gets its own rows, in their place.

        They are there behind the call returned; the other rows are then worth nothing.
        """
        return _nothing

    def begin_gather(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to fill a tensor with the rows that each rank has in it as its own.

        It is whole behind the call returned.
        """
        return _nothing

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of rank 0; returns it."""
        return tensor

    def all_of(self, fact: bool) -> bool:
        """Whether it is so on every rank. Waits for the device."""
        return fact

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers. Waits for the device."""
        return number

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums of the ranks' numbers, in double precision. Waits for the device."""
        return list(numbers)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A small tensor of every rank, in their order, on the CPU. Waits for the device."""
        return [tensor]

    def on_first(self, do: Callable[[], Any]) -> Any:
        """What `do` gives on rank 0, where alone it is called, told to all: something for JSON."""
        return do()

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """On each machine one rank goes first: what it leaves there, the others find."""
        yield

    def require_same(self, facts: dict[str, str]) -> None:
        """End the run where a rank has been started with something else than rank 0."""

    def agreement(self, lag: int) -> "Agreement":
        """A way to follow the largest of the ranks' numbers, step after step."""
        return Agreement()

    def mesh(self) -> "DeviceMesh | None":
        """All ranks in a row, as sharding wants them; None for one process."""
        return None

    def tick(self) -> None:
        """Say that this rank is getting on, so that nobody thinks it hangs."""

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Take as long as is needed, while the others may be waiting."""
        yield

    def leave(self) -> None:
        """The run is over: wait for the others, then part."""

    def end(self, code: int) -> int:
        """The exit code of a run that is over; comes back only on a process of its own."""
        return code

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends; comes back only on a process of its own."""


class Agreement:
    """The largest of what the ranks say in each step; every rank hears it at the same step."""

    def say(self, number: int) -> int:
        """Say this rank's number; gives what was agreed on, perhaps a few steps ago."""
        return number


class ManyRanks(Ranks):
    """One of several processes, with torch.distributed set up.

    Args:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on its machine.
        host: that machine.
        device: what it computes on.
        store: key-value store that all ranks reach.
        heartbeat: tells the others that it lives, and learns of those that do not.
    """

    def __init__(
        self,
        rank: int,
        *,
        size: int,
        local_rank: int,
        host: str,
        device: torch.device,
        store: Store,
        heartbeat: Heartbeat,
    ) -> None:
        self.rank, self.size, self.where = rank, size, f"rank {rank} on {host}"
        self._local_rank, self._host = local_rank, host
        self._device, self._store, self._heartbeat = device, store, heartbeat
        self._said = 0

    @property
    def local_device(self) -> str:
        """As `Ranks.local_device`."""
        return str(self._device)

    def sum(self, tensor: Tensor) -> Tensor:
        """As `Ranks.sum`."""
        dist.all_reduce(tensor)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_sum`."""
        return _waiting(dist.all_reduce(tensor, async_op=True))

    def begin_sum_to_own(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_sum_to_own`."""
        return _waiting(_sum_to_own(self.own(tensor), tensor, async_op=True))

    def begin_gather(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_gather`."""
        return _waiting(_gather(tensor, self.own(tensor), async_op=True))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """As `Ranks.broadcast`."""
        there = tensor.to(self._device)
        dist.broadcast(there, src=0)
        return tensor if there is tensor else tensor.copy_(there)

    def all_of(self, fact: bool) -> bool:
        """As `Ranks.all_of`."""
        return self.least(int(fact)) == 1

    def least(self, number: int) -> int:
        """As `Ranks.least`."""
        least = torch.tensor(number, device=self._device)
        with self._heartbeat.wait():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            return int(least)

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """As `Ranks.totals`."""
        found: list[float] = self.sum(
            torch.tensor(numbers, dtype=torch.float64, device=self._device)
        ).tolist()
        return found

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """As `Ranks.gather`."""
        own = tensor.to(self._device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [one.cpu() for one in found]

    def on_first(self, do: Callable[[], Any]) -> Any:
        """As `Ranks.on_first`."""
        # Over the store: it needs no GPU, and what it carries is text.
        key, self._said = f"said/{self._said}", self._said + 1
        if self.is_first:
            self._store.set(key, json.dumps(do()))
        return json.loads(self._get(key))

    @contextmanager
    def local_first(self) -> Iterator[None]:
        """As `Ranks.local_first`."""
        key, self._said = f"local/{self._host}/{self._said}", self._said + 1
        if self._local_rank:
            self._get(key)
        yield
        if not self._local_rank:
            self._store.set(key, "done")

    def require_same(self, facts: dict[str, str]) -> None:
        """As `Ranks.require_same`."""
        self._store.set(f"facts/{self.rank}", json.dumps({"where": self.where, **facts}))
        if not self.is_first:
            # Not on to a sum, which has a time limit, while another prepares its text.
            self._get("facts/compared")
            return
        try:
            for other in range(1, self.size):
                theirs = json.loads(self._get(f"facts/{other}"))
                for name, value in facts.items():
                    if theirs[name] != value:
                        raise UserError(
                            f"{theirs['where']} has another {name} than rank 0: {theirs[name]}, "
                            f"not {value}; all ranks need the same"
                        )
        finally:
            self._store.set("facts/compared", "yes")

    def agreement(self, lag: int) -> Agreement:
        """As `Ranks.agreement`."""
        return _LateAgreement(self._device, lag)

    def mesh(self) -> "DeviceMesh | None":
        """As `Ranks.mesh`."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self._device.type, (self.size,), mesh_dim_names=("ranks",))

    def tick(self) -> None:
        """As `Ranks.tick`."""
        self._heartbeat.progress += 1

    @contextmanager
    def busy(self) -> Iterator[None]:
        """As `Ranks.busy`."""
        self._heartbeat.busy += 1
        try:
            yield
        finally:
            self._heartbeat.busy -= 1
            self._heartbeat.progress += 1

    def _get(self, key: str) -> bytes:
        """Wait for a value in the store, as long as it takes: lost ranks are the heartbeat's."""
        with self._heartbeat.wait():
            while not self._store.check([key]):
                with suppress(dist.DistStoreError):
                    self._store.wait([key], WAIT)
            return self._store.get(key)

    def leave(self) -> None:
        """As `Ranks.leave`."""
        with self.busy():
            self.all_of(True)
            self._heartbeat.stop()
            # Nobody is gone before all have stopped to look for those who are.
            self.all_of(True)
            dist.destroy_process_group()

    def end(self, code: int) -> NoReturn:
        """As `Ranks.end`; ends the process without Python's own farewell.

        Everything is written and all have parted by now. torch keeps threads, and one of those that
        comes back to a Python that is going away aborts it now and then.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def fail(self, error: BaseException) -> NoReturn:
        """As `Ranks.fail`; ends the process: without all ranks a group never parts in peace."""
        self._heartbeat.fail(error)


class _LateAgreement(Agreement):
    """Over the ranks, read `lag` steps late, when a GPU has long computed it."""

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._unread: deque[Callable[[], int]] = deque()

    def say(self, number: int) -> int:
        self._unread.append(_send_largest(torch.full((), number, device=self._device)))
        return self._unread.popleft()() if len(self._unread) > self._lag else 0


def _send_largest(number: Tensor) -> Callable[[], int]:
    """The largest over the ranks, on its way to the host; reading it waits for that alone."""
    dist.all_reduce(number, dist.ReduceOp.MAX)
    if number.device.type != "cuda":
        return lambda: int(number)
    host = torch.empty((), dtype=number.dtype, pin_memory=True)
    host.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(number.device))

    def read() -> int:
        arrived.synchronize()
        return int(host)

    return read


# By their names since torch 2.13, which warns about those before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_sum_to_own = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _nothing() -> None:
    return None


def _waiting(work: dist.Work | None) -> Callable[[], None]:
    assert work is not None, "it was begun beside the computation"

    def wait() -> None:
        work.wait()

    return wait


ALONE = Ranks()
