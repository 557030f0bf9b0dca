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

from gptforge.distributed.watchdog import Watchdog
from gptforge.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


STORE_WAIT = timedelta(seconds=60)
"""A wait for another rank's value in the store is begun anew after so long."""


class Comm:
    """One process."""

    rank = 0
    world_size = 1
    label = ""
    """Rank and host, for messages."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes, prints and decides."""
        return self.rank == 0

    @property
    def local_device(self) -> str:
        """As `--device` names the one that this rank was given; empty where it may choose."""
        return ""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks, the same bits on all; returns it."""
        return tensor

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], None]:
        """Begin such a sum beside the computation; the tensor is whole behind the call returned."""
        return _nothing

    def local_rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor, of which every rank has as many."""
        each = len(tensor) // self.world_size
        return tensor[self.rank * each : (self.rank + 1) * each]

    def reduce_scatter_async(self, tensor: Tensor) -> Callable[[], None]:
        """Begin a sum of which each rank gets its own rows, in their place.

        They are there behind the call returned; the other rows are then worth nothing.
        """
        return _nothing

    def all_gather_async(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to fill a tensor with the rows that each rank has in it as its own.

        It is whole behind the call returned.
        """
        return _nothing

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of rank 0; returns it."""
        return tensor

    def all_true(self, flag: bool) -> bool:
        """Whether it is so on every rank. Waits for the device."""
        return flag

    def all_reduce_min(self, value: int) -> int:
        """The smallest of the ranks' numbers. Waits for the device."""
        return value

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """Sums of the ranks' numbers, in double precision. Waits for the device."""
        return list(values)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """A small tensor of every rank, in their order, on the CPU. Waits for the device."""
        return [tensor]

    def broadcast_from_rank0(self, compute: Callable[[], Any]) -> Any:
        """What `do` gives on rank 0, where alone it is called, told to all: something for JSON."""
        return compute()

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """On each machine one rank goes first: what it leaves there, the others find."""
        yield

    def assert_same(self, values: dict[str, str]) -> None:
        """End the run where a rank has been started with something else than rank 0."""

    def async_max(self, lag: int) -> "AsyncMax":
        """A way to follow the largest of the ranks' numbers, step after step."""
        return AsyncMax()

    def device_mesh(self) -> "DeviceMesh | None":
        """All ranks in a row, as sharding wants them; None for one process."""
        return None

    def tick(self) -> None:
        """Say that this rank is getting on, so that nobody thinks it hangs."""

    @contextmanager
    def pause_stall_check(self) -> Iterator[None]:
        """Take as long as is needed, while the others may be waiting."""
        yield

    def shutdown(self) -> None:
        """The run is over: wait for the others, then part."""

    def exit(self, code: int) -> int:
        """The exit code of a run that is over; comes back only on a process of its own."""
        return code

    def abort(self, error: BaseException) -> None:
        """Tell the others why this rank ends; comes back only on a process of its own."""


class AsyncMax:
    """The largest of what the ranks say in each step; every rank hears it at the same step."""

    def update(self, value: int) -> int:
        """Say this rank's number; gives what was agreed on, perhaps a few steps ago."""
        return value


class DistributedComm(Comm):
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
        world_size: int,
        local_rank: int,
        host: str,
        device: torch.device,
        store: Store,
        watchdog: Watchdog,
    ) -> None:
        self.rank, self.world_size, self.label = rank, world_size, f"rank {rank} on {host}"
        self._local_rank, self._host = local_rank, host
        self._device, self._store, self._watchdog = device, store, watchdog
        self._said = 0

    @property
    def local_device(self) -> str:
        """As `Ranks.local_device`."""
        return str(self._device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """As `Ranks.sum`."""
        dist.all_reduce(tensor)
        return tensor

    def all_reduce_async(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_sum`."""
        return _waiting(dist.all_reduce(tensor, async_op=True))

    def reduce_scatter_async(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_sum_to_own`."""
        return _waiting(_sum_to_own(self.local_rows(tensor), tensor, async_op=True))

    def all_gather_async(self, tensor: Tensor) -> Callable[[], None]:
        """As `Ranks.begin_gather`."""
        return _waiting(_gather(tensor, self.local_rows(tensor), async_op=True))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """As `Ranks.broadcast`."""
        there = tensor.to(self._device)
        dist.broadcast(there, src=0)
        return tensor if there is tensor else tensor.copy_(there)

    def all_true(self, flag: bool) -> bool:
        """As `Ranks.all_of`."""
        return self.all_reduce_min(int(flag)) == 1

    def all_reduce_min(self, value: int) -> int:
        """As `Ranks.least`."""
        least = torch.tensor(value, device=self._device)
        with self._watchdog.wait_for_ranks():
            dist.all_reduce(least, dist.ReduceOp.MIN)
            return int(least)

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """As `Ranks.totals`."""
        found: list[float] = self.all_reduce(
            torch.tensor(values, dtype=torch.float64, device=self._device)
        ).tolist()
        return found

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """As `Ranks.gather`."""
        own = tensor.to(self._device)
        found = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(found, own)
        return [one.cpu() for one in found]

    def broadcast_from_rank0(self, compute: Callable[[], Any]) -> Any:
        """As `Ranks.on_first`."""
        # Over the store: it needs no GPU, and what it carries is text.
        key, self._said = f"said/{self._said}", self._said + 1
        if self.is_main:
            self._store.set(key, json.dumps(compute()))
        return json.loads(self._get(key))

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """As `Ranks.local_first`."""
        key, self._said = f"local/{self._host}/{self._said}", self._said + 1
        if self._local_rank:
            self._get(key)
        yield
        if not self._local_rank:
            self._store.set(key, "done")

    def assert_same(self, values: dict[str, str]) -> None:
        """As `Ranks.require_same`."""
        self._store.set(f"facts/{self.rank}", json.dumps({"where": self.label, **values}))
        if not self.is_main:
            # Not on to a sum, which has a time limit, while another prepares its text.
            self._get("facts/compared")
            return
        try:
            for other in range(1, self.world_size):
                theirs = json.loads(self._get(f"facts/{other}"))
                for name, value in values.items():
                    if theirs[name] != value:
                        raise UserError(
                            f"{theirs['where']} has another {name} than rank 0: {theirs[name]}, "
                            f"not {value}; all ranks need the same"
                        )
        finally:
            self._store.set("facts/compared", "yes")

    def async_max(self, lag: int) -> AsyncMax:
        """As `Ranks.agreement`."""
        return _DelayedMax(self._device, lag)

    def device_mesh(self) -> "DeviceMesh | None":
        """As `Ranks.mesh`."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self._device.type, (self.world_size,), mesh_dim_names=("ranks",))

    def tick(self) -> None:
        """As `Ranks.tick`."""
        self._watchdog.progress += 1

    @contextmanager
    def pause_stall_check(self) -> Iterator[None]:
        """As `Ranks.busy`."""
        self._watchdog.busy += 1
        try:
            yield
        finally:
            self._watchdog.busy -= 1
            self._watchdog.progress += 1

    def _get(self, key: str) -> bytes:
        """Wait for a value in the store, as long as it takes: lost ranks are the heartbeat's."""
        with self._watchdog.wait_for_ranks():
            while not self._store.check([key]):
                with suppress(dist.DistStoreError):
                    self._store.wait([key], STORE_WAIT)
            return self._store.get(key)

    def shutdown(self) -> None:
        """As `Ranks.leave`."""
        with self.pause_stall_check():
            self.all_true(True)
            self._watchdog.stop()
            # Nobody is gone before all have stopped to look for those who are.
            self.all_true(True)
            dist.destroy_process_group()

    def exit(self, code: int) -> NoReturn:
        """As `Ranks.end`; ends the process without Python's own farewell.

        Everything is written and all have parted by now. torch keeps threads, and one of those that
        comes back to a Python that is going away aborts it now and then.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def abort(self, error: BaseException) -> NoReturn:
        """As `Ranks.fail`; ends the process: without all ranks a group never parts in peace."""
        self._watchdog.abort(error)


class _DelayedMax(AsyncMax):
    """Over the ranks, read `lag` steps late, when a GPU has long computed it."""

    def __init__(self, device: torch.device, lag: int) -> None:
        self._device, self._lag = device, lag
        self._unread: deque[Callable[[], int]] = deque()

    def update(self, value: int) -> int:
        self._unread.append(_send_largest(torch.full((), value, device=self._device)))
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


SINGLE_PROCESS = Comm()
