"""cuBLASLt through its C interface: autotuned GEMMs with an epilogue.

torch calls the same library, but always runs the heuristic's first choice, and its only epilogue is
the bias. At GPT-2's shapes on an H100 the second to eighth choices are up to 17% faster, so each
shape is autotuned once (figures in docs/log.md).

The library is the one that torch has loaded; constants are those of cublasLt.h in CUDA 12 and 13.

cuBLAS is column-major, so it reads a row-major tensor as the transpose. To get left @ right it
computes (left @ right).T = right.T @ left.T: the operands are swapped, and no data is moved.
"""

import ctypes
import statistics
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

# cublasLt.h: cublasComputeType_t, cudaDataType_t, cublasLtMatmulDescAttributes_t,
# cublasLtMatmulPreferenceAttributes_t
_COMPUTE_32F = 68
_R_32F, _R_16BF = 0, 14
_INPUT_TYPES = {torch.bfloat16: _R_16BF, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8
_EPILOGUE_AUX_POINTER, _EPILOGUE_AUX_LD = 11, 12
_A_SCALE_POINTER, _B_SCALE_POINTER, _FAST_ACCUM = 17, 18, 25
_PREF_MAX_WORKSPACE_BYTES = 1

WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS recommends for Hopper."""
MAX_CANDIDATES = 16
NUM_FINALISTS, NUM_REPEATS = 4, 4
"""All candidates are timed once, then the fastest NUM_FINALISTS NUM_REPEATS times each."""
SLEEP_CYCLES = 2_000_000
"""About a millisecond, in which all launches are queued, so launch overhead is not timed."""
ALIGNMENT = 256
"""Bytes; the heuristic assumes pointers aligned to this."""

_Value = ctypes.c_int | ctypes.c_int8 | ctypes.c_uint32 | ctypes.c_int64 | ctypes.c_void_p


class Epilogue(IntEnum):
    """cublasLtEpilogue_t: applied to the result before it is written."""

    DEFAULT = 1
    BIAS = 4
    GELU_AUX_BIAS = 164
    """Bias, then GELU; the GELU's input is written to aux."""
    DGELU = 192
    """Multiply by the GELU's derivative at aux."""


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves_count", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Library:
    """The loaded library, with a handle and a workspace for one device."""

    def __init__(self, device: torch.device) -> None:
        version = (torch.version.cuda or "").partition(".")[0]
        # For a soname that is loaded already, dlopen returns that copy: torch's.
        self._lib = ctypes.CDLL(f"libcublasLt.so.{version}")
        with torch.cuda.device(device):
            # A cuBLAS handle is a valid cuBLASLt handle.
            self.handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def call(self, name: str, *args: object) -> None:
        """Call `cublasLt<name>`; a RuntimeError if its status is not success."""
        if status := getattr(self._lib, f"cublasLt{name}")(*args):
            raise RuntimeError(f"cublasLt{name} returned status {status}")


class MatmulPlan:
    """A GEMM of two tensors of fixed shapes; autotuned on its first call.

    Args:
        device: of all tensors.
        left: shape of the first operand; `right` is that of the second.
        dtypes: of the two: bfloat16, or fp8 with `transpose` (False, True) and sizes that are
            multiples of 16.
        transpose: whether each of the two is transposed before the GEMM.
        epilogue: applied to the result.
        accumulate: add the result to a float32 output, instead of writing bfloat16.
        fast_accum: in fp8, sum less accurately, but faster.

    Raises:
        RuntimeError: if the library has no kernel for these arguments.
        OSError: if the library cannot be loaded.
    """

    def __init__(
        self,
        device: torch.device,
        left: torch.Size,
        right: torch.Size,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
        transpose: tuple[bool, bool] = (False, False),
        epilogue: Epilogue = Epilogue.DEFAULT,
        accumulate: bool = False,
        fast_accum: bool = False,
    ) -> None:
        self._lib = _library(device)
        rows, columns = left[transpose[0]], right[not transpose[1]]
        self._desc = ctypes.c_void_p()
        # Accumulation and scales are fp32.
        self._lib.call("MatmulDescCreate", ctypes.byref(self._desc), _COMPUTE_32F, _R_32F)
        # cuBLAS's A is our second operand.
        self._set(_TRANSA, ctypes.c_int(transpose[1]))
        self._set(_TRANSB, ctypes.c_int(transpose[0]))
        self._set(_EPILOGUE, ctypes.c_uint32(epilogue))
        # The heuristic checks the alignment of these pointers, which are unknown until the first
        # call; the workspace stands in for them, with the same alignment.
        placeholder = ctypes.c_void_p(self._lib.workspace.data_ptr())
        if epilogue in (Epilogue.BIAS, Epilogue.GELU_AUX_BIAS):
            self._set(_BIAS_POINTER, placeholder)
        if epilogue in (Epilogue.GELU_AUX_BIAS, Epilogue.DGELU):
            self._set(_EPILOGUE_AUX_POINTER, placeholder)
            self._set(_EPILOGUE_AUX_LD, ctypes.c_int64(columns))
        if torch.bfloat16 not in dtypes:
            self._set(_A_SCALE_POINTER, placeholder)
            self._set(_B_SCALE_POINTER, placeholder)
            self._set(_FAST_ACCUM, ctypes.c_int8(fast_accum))
        left_type, right_type = (_INPUT_TYPES[dtype] for dtype in dtypes)
        self._left, self._right = self._layout(left, left_type), self._layout(right, right_type)
        out_shape = torch.Size((rows, columns))
        self._out = self._layout(out_shape, _R_32F if accumulate else _R_16BF)
        self._candidates = self._query_heuristic()
        self._best = self._candidates[0]
        self._is_tuned = len(self._candidates) == 1
        self._accumulate = accumulate
        # out = alpha * result + beta * out
        self._alpha, self._beta = ctypes.c_float(1), ctypes.c_float(accumulate)

    def __call__(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        *,
        bias: Tensor | None = None,
        aux: Tensor | None = None,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Write or, with `accumulate`, add to `out`; all tensors are contiguous.

        `aux` is shaped like `out`: the GELU's input, written by GELU_AUX_BIAS, read by DGELU. In
        fp8, `scales` has float32 scalars, which multiply the two operands.
        """
        if scales is not None:
            self._set(_A_SCALE_POINTER, ctypes.c_void_p(scales[1].data_ptr()))
            self._set(_B_SCALE_POINTER, ctypes.c_void_p(scales[0].data_ptr()))
        if bias is not None:
            self._set(_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        if aux is not None:
            self._set(_EPILOGUE_AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        # Timing needs a synchronization, which a CUDA graph cannot capture.
        if not self._is_tuned and not torch.cuda.is_current_stream_capturing():
            self._autotune(left, right, out)
        self._run(self._best, left, right, out)
        return out

    def _run(self, candidate: _HeuristicResult, left: Tensor, right: Tensor, out: Tensor) -> None:
        pointer, lib = ctypes.c_void_p, self._lib
        out_ptr = pointer(out.data_ptr())
        lib.call(
            "Matmul", lib.handle, self._desc, ctypes.byref(self._alpha),
            pointer(right.data_ptr()), self._right, pointer(left.data_ptr()), self._left,
            ctypes.byref(self._beta), out_ptr, self._out, out_ptr, self._out,
            ctypes.byref(candidate.algo), pointer(lib.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES),
            pointer(torch.cuda.current_stream(out.device).cuda_stream),
        )  # fmt: skip

    def _autotune(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        self._is_tuned = True
        if torch.are_deterministic_algorithms_enabled():
            # Timings vary from run to run, and kernels differ in the last bits.
            return
        if self._accumulate:
            # Trials must not add to the real gradient.
            try:
                out = torch.zeros_like(out)
            except torch.OutOfMemoryError:
                return
        usable = []
        for candidate in self._candidates:
            try:
                self._run(candidate, left, right, out)
            except RuntimeError:
                continue
            usable.append(candidate)
        # With no usable kernel, `_best` stays the first choice, and the call raises its error.
        if usable:
            usable = self._sort_by_time(usable, 1, left, right, out)
            finalists = usable[:NUM_FINALISTS]
            self._best = self._sort_by_time(finalists, NUM_REPEATS, left, right, out)[0]

    def _sort_by_time(
        self,
        candidates: list[_HeuristicResult],
        repeats: int,
        left: Tensor,
        right: Tensor,
        out: Tensor,
    ) -> list[_HeuristicResult]:
        """Fastest first, by the median of interleaved repeats."""
        events = [
            [torch.cuda.Event(enable_timing=True) for _ in range(len(candidates) + 1)]
            for _ in range(repeats)
        ]
        torch.cuda._sleep(SLEEP_CYCLES)
        # Interleaved, so that a change of the clock rate affects all candidates.
        for row in events:
            row[0].record()
            for event, candidate in zip(row[1:], candidates, strict=True):
                self._run(candidate, left, right, out)
                event.record()
        torch.cuda.synchronize(out.device)

        def median_time(i: int) -> float:
            return float(statistics.median(row[i].elapsed_time(row[i + 1]) for row in events))

        return [candidates[i] for i in sorted(range(len(candidates)), key=median_time)]

    def _query_heuristic(self) -> list[_HeuristicResult]:
        preference = ctypes.c_void_p()
        self._lib.call("MatmulPreferenceCreate", ctypes.byref(preference))
        size = ctypes.c_uint64(WORKSPACE_BYTES)
        self._lib.call(
            "MatmulPreferenceSetAttribute", preference, _PREF_MAX_WORKSPACE_BYTES,
            ctypes.byref(size), ctypes.sizeof(size),
        )  # fmt: skip
        results, count = (_HeuristicResult * MAX_CANDIDATES)(), ctypes.c_int()
        self._lib.call(
            "MatmulAlgoGetHeuristic", self._lib.handle, self._desc, self._right, self._left,
            self._out, self._out, preference, MAX_CANDIDATES, results, ctypes.byref(count),
        )  # fmt: skip
        if not count.value:
            raise RuntimeError("cuBLASLt has no kernel for this GEMM")
        return results[: count.value]

    def _set(self, attribute: int, value: _Value) -> None:
        self._lib.call(
            "MatmulDescSetAttribute", self._desc, attribute, ctypes.byref(value),
            ctypes.sizeof(value),
        )  # fmt: skip

    def _layout(self, shape: torch.Size, dtype: int) -> ctypes.c_void_p:
        """Layout of a row-major tensor: to cuBLAS, its transpose."""
        rows, columns = shape
        layout = ctypes.c_void_p()
        self._lib.call(
            "MatrixLayoutCreate", ctypes.byref(layout), dtype, ctypes.c_uint64(columns),
            ctypes.c_uint64(rows), ctypes.c_int64(columns),
        )  # fmt: skip
        return layout


_library = cache(_Library)  # one per device
