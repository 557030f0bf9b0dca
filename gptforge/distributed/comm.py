"""Collectives and barriers between ranks, all of which must make the same calls in the same order.

No call waits for the GPU unless it says so. In a single process they do nothing.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from gptforge.device import copy_to_host_async
from gptforge.distributed.watchdog import Watchdog
from gptforge.errors import UserError

STORE_WAIT = timedelta(seconds=60)
"""Timeout of one wait for a key of the store, which is then repeated."""

# torch 2.13 renamed these and warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Wait = Callable[[], None]  # waits for an asynchronous collective


@dataclass(frozen=True)
class Group:
    """An initialized torch.distributed process group, and this process's place in it."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    device: torch.device
    store: Store  # key-value store shared by all ranks
    watchdog: Watchdog


class Comm:
    """Communication with the other ranks; with none if there is no process group."""

    rank = 0
    world_size = 1
    label = ""  # rank and host, for messages

    def __init__(self, group: Group | None = None) -> None:
        self._group = group
        self._num_keys = 0
        if group is not None:
            self.rank, self.world_size = group.rank, group.world_size
            self.label = f"rank {group.rank} on {group.host}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes, prints and decides."""
        return self.rank == 0

    @property
    def local_device(self) -> str:
        """The device assigned to this rank, as `--device` names it; empty if it may choose."""
        return "" if self._group is None else str(self._group.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks in place, bitwise equal on all of them; returns it."""
        if self._group is not None:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_async(self, tensor: Tensor) -> Wait:
        """Start `all_reduce`; the tensor is valid once the returned function has been called."""
        return self._start(dist.all_reduce, tensor)

    def local_rows(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor that belong to this rank: one of `world_size` equal chunks."""
        chunk = len(tensor) // self.world_size
        return tensor[self.rank * chunk : (self.rank + 1) * chunk]

    def reduce_scatter_async(self, tensor: Tensor) -> Wait:
        """Start a sum over the ranks of which each gets its `local_rows`, in place.

        The other rows are undefined afterwards.
        """
        return self._start(_reduce_scatter, self.local_rows(tensor), tensor)

    def all_gather_async(self, tensor: Tensor) -> Wait:
        """Start to fill a tensor with the `local_rows` of every rank, in place."""
        return self._start(_all_gather, tensor, self.local_rows(tensor))

    def _start(self, collective: Callable[..., dist.Work | None], *tensors: Tensor) -> Wait:
        work = collective(*tensors, async_op=True) if self._group else None
        return cast(Wait, work.wait) if work else lambda: None

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with that of rank 0; returns it."""
        if self._group is None:
            return tensor
        on_device = tensor.to(self._group.device)
        dist.broadcast(on_device, src=0)
        return tensor if on_device is tensor else tensor.copy_(on_device)

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is true on every rank. Waits for the device."""
        return self.all_reduce_min(int(flag)) == 1

    def all_reduce_min(self, value: int) -> int:
        """The smallest value of any rank. Waits for the device."""
        if self._group is None:
            return value
        minimum = torch.tensor(value, device=self._group.device)
        with self._group.watchdog.wait_for_ranks():
            dist.all_reduce(minimum, dist.ReduceOp.MIN)
            return int(minimum)

    def sum_scalars(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in double precision. Waits for the device."""
        if self._group is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self._group.device)
        return list(self.all_reduce(sums).tolist())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Small tensors of all ranks, by rank, on the CPU. Waits for the device."""
        if self._group is None:
            return [tensor]
        tensor = tensor.to(self._group.device)
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return [each.cpu() for each in gathered]

    def broadcast_from_rank0(self, compute: Callable[[], Any]) -> Any:
        """Call `compute` on rank 0 only and give all ranks its result, which must be JSON."""
        if self._group is None:
            return compute()
        # Through the store: the result is text, and needs no GPU.
        key = self._next_key("broadcast")
        if self.is_main:
            self._group.store.set(key, json.dumps(compute()))
        return json.loads(self._get(key))

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the body on the first rank of each machine before the others, to fill a cache."""
        if self._group is None:
            yield
            return
        key = self._next_key(f"local/{self._group.host}")
        if self._group.local_rank:
            self._get(key)
        yield
        if not self._group.local_rank:
            self._group.store.set(key, "done")

    def assert_same(self, values: dict[str, str]) -> None:
        """Raise a UserError on all ranks if one was started with other values than rank 0."""
        if self._group is None:
            return
        key = self._next_key("values")
        self._group.store.set(f"{key}/{self.rank}", json.dumps({"label": self.label, **values}))

        def find_difference() -> str:
            for rank in range(1, self.world_size):
                other = json.loads(self._get(f"{key}/{rank}"))
                for name, value in values.items():
                    if other[name] != value:
                        return (
                            f"{other['label']} has another {name} than rank 0: {other[name]}, "
                            f"not {value}; all ranks need the same"
                        )
            return ""

        # Not by a collective, which would time out while another rank prepares its text.
        if problem := self.broadcast_from_rank0(find_difference):
            raise UserError(problem)

    def async_max(self, lag: int) -> "AsyncMax":
        """A maximum over the ranks in every step, read `lag` steps late."""
        return AsyncMax(None if self._group is None else self._group.device, lag)

    def tick(self) -> None:
        """Tell the watchdog that this rank makes progress."""
        if self._group is not None:
            self._group.watchdog.progress += 1

    def pause_stall_check(self) -> AbstractContextManager[None]:
        """Take as long as needed in the body while other ranks may be waiting."""
        return nullcontext() if self._group is None else self._group.watchdog.pause_stall_check()

    def shutdown(self) -> None:
        """Wait for all ranks at the end of a run and destroy the process group."""
        if self._group is None:
            return
        with self.pause_stall_check():
            self.all_true(True)
            self._group.watchdog.stop()
            with suppress(RuntimeError):  # a rank that dies from here on has nothing left to do
                # No rank leaves before all watchdogs have stopped looking for lost ones.
                self.all_true(True)
                dist.destroy_process_group()

    def exit(self, code: int) -> int:
        """End the process after a run; a single process only returns its exit code."""
        if self._group is not None:
            # Without Python's own shutdown: a torch thread that returns to the finalizing
            # interpreter aborts it now and then. All files are written and all ranks have left.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def abort(self, error: BaseException) -> None:
        """End all ranks because of an error on this one; returns only in a single process."""
        if self._group is not None:
            self._group.watchdog.abort(error)

    def _next_key(self, prefix: str) -> str:
        self._num_keys += 1
        return f"{prefix}/{self._num_keys}"

    def _get(self, key: str) -> bytes:
        """Wait for a key of the store without a time limit: the watchdog finds lost ranks."""
        assert self._group is not None
        store = self._group.store
        with self._group.watchdog.wait_for_ranks():
            while not store.check([key]):
                with suppress(dist.DistStoreError):
                    store.wait([key], STORE_WAIT)
            return store.get(key)


class AsyncMax:
    """A maximum over the ranks, the same on all of them at the same step.

    Args:
        device: of this rank; None for a single process.
        lag: how many steps late it is read, when a GPU has long computed it.
    """

    def __init__(self, device: torch.device | None = None, lag: int = 0) -> None:
        self._device, self._lag = device, lag
        self._pending: deque[Callable[[], Tensor]] = deque()

    def update(self, value: int) -> int:
        """Submit this step's value; returns the maximum of `lag` steps ago, 0 before that."""
        if self._device is None:
            return value
        maximum = torch.full((), value, device=self._device)
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        self._pending.append(copy_to_host_async(maximum))
        return int(self._pending.popleft()()) if len(self._pending) > self._lag else 0


SINGLE_PROCESS = Comm()
