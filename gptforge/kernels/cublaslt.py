"""cuBLASLt, called by its C interface: products with an epilogue, by the fastest of its kernels.

torch calls the same library, but always runs the kernel that the library's heuristic puts first,
and of the epilogues offers the bias alone. At GPT-2's shapes on an H100 the heuristic's second to
eighth choices are up to 17% faster, so each shape is tried out once. docs/log.md has the figures.

The library is the one that torch has loaded. Its constants are those of cublasLt.h, CUDA 12 and 13.

All tensors are row by row, as torch has them; cuBLAS counts column by column, so it sees each of
them transposed, and computes the transposed product of the factors in the other order.
"""

import ctypes
import statistics
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_COMPUTE_FLOAT32, _REAL_FLOAT32, _REAL_BFLOAT16 = 68, 0, 14
_TRANSPOSE_A, _TRANSPOSE_B, _EPILOGUE, _BIAS, _AUX, _AUX_STRIDE = 3, 4, 7, 8, 11, 12
_WORKSPACE_BYTES = 1
EPILOGUE_DEFAULT, EPILOGUE_BIAS, EPILOGUE_GELU_AUX_BIAS, EPILOGUE_DGELU = 1, 4, 164, 192
"""Epilogues: none; bias; bias and GELU, the GELU's input kept; times the GELU's slope."""

WORKSPACE = 32 * 2**20
"""Bytes that kernels may use beside their output; what cuBLAS recommends for Hopper."""
CANDIDATES = 16
FINALISTS, ROUNDS = 4, 4
"""Candidates that are timed again, those that were fastest once, and how often."""
COUNTERS = 4096
"""Bytes: a workspace no larger holds counters only, by which a kernel hands its tiles out. They are
cleared beforehand, which costs a small product a tenth of its time; without a workspace most of
these kernels hand out by a rule."""
SMALL = 5e10
"""FLOPs of a product up to which it is tried without: a larger one hardly feels the clearing."""
LOOKED_AT = 2**16
"""Numbers of an output that are compared."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond, that the device waits before a trial: kernels stand in line then,
and the clock does not measure how fast they are asked for."""
ALIGNMENT = 256
"""Bytes: what the heuristic takes for granted of an address."""


_Value = ctypes.c_int | ctypes.c_uint32 | ctypes.c_int64 | ctypes.c_void_p


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: a kernel with its settings."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Kernel(NamedTuple):
    """A choice, and bytes of workspace that it is given."""

    choice: _Choice
    workspace_bytes: int


class _Library:
    """The loaded library, with a handle for one device."""

    def __init__(self, device: torch.device) -> None:
        version = (torch.version.cuda or "").partition(".")[0]
        # By its name alone, the loader gives back what is in memory already.
        self._calls = ctypes.CDLL(f"libcublasLt.so.{version}")
        with torch.cuda.device(device):
            # A cuBLAS handle serves as one of cuBLASLt.
            self.handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)

    def call(self, name: str, *args: object) -> None:
        """Call a function by its name behind `cublasLt`.

        Raises:
            RuntimeError: with cuBLAS's number, if it does not succeed.
        """
        status = getattr(self._calls, f"cublasLt{name}")(*args)
        if status:
            raise RuntimeError(f"cuBLASLt's {name} gave status {status}")


class MatmulPlan:
    """A product of two bfloat16 tensors of fixed shapes, ready to be run.

    Args:
        device: of all tensors.
        left: shape of the first factor.
        right: shape of the second factor.
        turned: whether each of the two is transposed before it is multiplied.
        epilogue: what is done to the result.
        adds: whether the product is added to what is there, in float32; otherwise it is bfloat16.

    Raises:
        RuntimeError: if the library has no kernel for it.
        OSError: if there is no library.
    """

    def __init__(
        self,
        device: torch.device,
        left: torch.Size,
        right: torch.Size,
        *,
        transpose: tuple[bool, bool] = (False, False),
        epilogue: int = EPILOGUE_DEFAULT,
        accumulate: bool = False,
    ) -> None:
        self._lib = _library(device)
        rows, columns = left[transpose[0]], right[not transpose[1]]
        self._description = ctypes.c_void_p()
        self._lib.call(
            "MatmulDescCreate", ctypes.byref(self._description), _COMPUTE_FLOAT32, _REAL_FLOAT32
        )
        # The second factor is cuBLAS's first.
        self._set(_TRANSPOSE_A, ctypes.c_int(transpose[1]))
        self._set(_TRANSPOSE_B, ctypes.c_int(transpose[0]))
        self._set(_EPILOGUE, ctypes.c_uint32(epilogue))
        # The library looks at the addresses, or at their alignment, before there are any.
        somewhere = ctypes.c_void_p(self._lib.workspace.data_ptr())
        if epilogue in (EPILOGUE_BIAS, EPILOGUE_GELU_AUX_BIAS):
            self._set(_BIAS, somewhere)
        if epilogue in (EPILOGUE_GELU_AUX_BIAS, EPILOGUE_DGELU):
            self._set(_AUX, somewhere)
            self._set(_AUX_STRIDE, ctypes.c_int64(columns))
        self._left, self._right = (self._layout(x, _REAL_BFLOAT16) for x in (left, right))
        self._output = self._layout(
            torch.Size((rows, columns)), _REAL_FLOAT32 if accumulate else _REAL_BFLOAT16
        )
        flops = 2 * rows * columns * left[not transpose[0]]
        self._kernels = self._candidates(is_small=flops <= SMALL)
        self._chosen = self._kernels[0]
        self._is_tried = len(self._kernels) == 1
        self._adds = accumulate
        self._one, self._kept = ctypes.c_float(1), ctypes.c_float(accumulate)

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        aux: Tensor | None = None,
    ) -> Tensor:
        """Compute the product into `out`, or onto it; at first by all, to find the fastest.

        All are contiguous. `aux` (as `out`) is the GELU's input: written where the epilogue keeps
        it, read where it takes its slope.
        """
        if bias is not None:
            self._set(_BIAS, ctypes.c_void_p(bias.data_ptr()))
        if aux is not None:
            self._set(_AUX, ctypes.c_void_p(aux.data_ptr()))
        if not self._is_tried and not torch.cuda.is_current_stream_capturing():
            self._choose(left, right, out)
        self._run(self._chosen, left, right, out)
        return out

    def _run(self, kernel: _Kernel, left: Tensor, right: Tensor, out: Tensor) -> None:
        pointer, lib = ctypes.c_void_p, self._lib
        result = pointer(out.data_ptr())
        workspace = lib.workspace.data_ptr() if kernel.workspace_bytes else None
        lib.call(
            "Matmul", lib.handle, self._description, ctypes.byref(self._one),
            pointer(right.data_ptr()), self._right, pointer(left.data_ptr()), self._left,
            ctypes.byref(self._kept), result, self._output, result, self._output,
            ctypes.byref(kernel.choice.algorithm), pointer(workspace),
            ctypes.c_size_t(kernel.workspace_bytes),
            pointer(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip

    def _choose(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Time the candidates, in turns, and keep the fastest."""
        self._is_tried = True
        if torch.are_deterministic_algorithms_enabled():
            # The clock must not decide about bits.
            return
        if self._adds:
            try:
                out = torch.zeros_like(out)
            except torch.OutOfMemoryError:
                # There is room for the product, if not for trials beside what it is added to.
                return
        able = []
        for kernel in self._kernels:
            try:
                self._run(kernel, left, right, out)
            except RuntimeError:
                continue
            if kernel.workspace_bytes or self._is_right(kernel, left, right, out):
                able.append(kernel)
        if not able:
            # The product itself says why.
            return
        able = self._by_time(able, 1, left, right, out)
        self._chosen = self._by_time(able[:FINALISTS], ROUNDS, left, right, out)[0]

    def _is_right(self, kernel: _Kernel, left: Tensor, right: Tensor, out: Tensor) -> bool:
        """Whether a kernel that was refused its workspace gives what it gives with it, to the bit.

        No manual says that it may go without. Some numbers of the output tell: there may be no room
        for all of them twice.
        """
        seen = []
        for room in (WORKSPACE, kernel.workspace_bytes):
            if self._adds:
                out.zero_()
            self._run(kernel._replace(workspace_bytes=room), left, right, out)
            seen.append(out.view(-1)[:: max(1, out.numel() // LOOKED_AT)].clone())
        return torch.equal(*seen)

    def _by_time(
        self, kernels: list[_Kernel], rounds: int, left: Tensor, right: Tensor, out: Tensor
    ) -> list[_Kernel]:
        """The same, the fastest first."""
        marks = [
            [torch.cuda.Event(enable_timing=True) for _ in range(len(kernels) + 1)]
            for _ in range(rounds)
        ]
        torch.cuda._sleep(HEAD_START)
        for row in marks:
            row[0].record()
            for mark, kernel in zip(row[1:], kernels, strict=True):
                self._run(kernel, left, right, out)
                mark.record()
        torch.cuda.synchronize(out.device)
        times = [
            statistics.median(row[i].elapsed_time(row[i + 1]) for row in marks)
            for i in range(len(kernels))
        ]
        return [kernels[i] for i in sorted(range(len(kernels)), key=times.__getitem__)]

    def _candidates(self, *, is_small: bool) -> list[_Kernel]:
        preference = ctypes.c_void_p()
        self._lib.call("MatmulPreferenceCreate", ctypes.byref(preference))
        size = ctypes.c_uint64(WORKSPACE)
        self._lib.call(
            "MatmulPreferenceSetAttribute", preference, _WORKSPACE_BYTES, ctypes.byref(size),
            ctypes.sizeof(size),
        )  # fmt: skip
        found, count = (_Choice * CANDIDATES)(), ctypes.c_int()
        self._lib.call(
            "MatmulAlgoGetHeuristic", self._lib.handle, self._description, self._right,
            self._left, self._output, self._output, preference, CANDIDATES, found,
            ctypes.byref(count),
        )  # fmt: skip
        if not count.value:
            raise RuntimeError("cuBLASLt has no kernel for this product")
        choices = found[: count.value]
        frugal = [x for x in choices if is_small and 0 < x.workspace <= COUNTERS]
        return [_Kernel(x, WORKSPACE) for x in choices] + [_Kernel(x, 0) for x in frugal]

    def _set(self, attribute: int, value: _Value) -> None:
        self._lib.call(
            "MatmulDescSetAttribute", self._description, attribute, ctypes.byref(value),
            ctypes.sizeof(value),
        )  # fmt: skip

    def _layout(self, shape: torch.Size, kind: int) -> ctypes.c_void_p:
        """Of a tensor row by row; cuBLAS calls its rows columns."""
        rows, columns = shape
        layout = ctypes.c_void_p()
        self._lib.call(
            "MatrixLayoutCreate", ctypes.byref(layout), kind, ctypes.c_uint64(columns),
            ctypes.c_uint64(rows), ctypes.c_int64(columns),
        )  # fmt: skip
        return layout


@cache
def _library(device: torch.device) -> _Library:
    return _Library(device)
