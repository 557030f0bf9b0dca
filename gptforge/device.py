"""The device to run on, the precision to compute in, seeds, and how much memory is free."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptforge.config import SEED_LIMIT, Config
from gptforge.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of GNU's mallopt, from its malloc.h


@dataclass(frozen=True)
class Precision:
    """The dtype of matmuls and why it was selected. Weights and optimizer state are float32."""

    dtype: torch.dtype
    reason: str
    float8: bool = False  # whether the matmuls of training are in fp8, and the rest in `dtype`

    @property
    def name(self) -> str:
        """The dtype as `--dtype` spells it."""
        return "fp8" if self.float8 else str(self.dtype).removeprefix("torch.")

    @property
    def is_mixed(self) -> bool:
        """Whether autocast is on."""
        return self.dtype != torch.float32

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients need loss scaling: float16 underflows below 6e-8."""
        return self.dtype == torch.float16


def select_device(flag: str) -> tuple[torch.device, str]:
    """Resolve `--device` to a device and a short description of it.

    Raises:
        UserError: if there is no such device on this machine.
    """
    kind, _, index = flag.partition(":")
    has_mps = torch.backends.mps.is_available()
    if flag == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {flag}: give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        return _select_cuda(flag, int(index or 0))
    if kind == "mps":
        if not has_mps:
            raise UserError(f"--device {flag}: torch finds no Apple GPU here; use --device auto")
        return torch.device("mps"), "Apple GPU"
    threads = torch.get_num_threads()
    return torch.device("cpu"), f"{threads} threads" if threads > 1 else "1 thread"


def _select_cuda(flag: str, index: int) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        raise UserError(f"--device {flag}: torch finds no CUDA GPU here; use --device auto")
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {flag}: the GPUs here are 0 to {torch.cuda.device_count() - 1}")
    # Triton launches on the current device. GPU 0 is current by default, and setting it before
    # CUDA is initialized would block on the driver.
    if index or torch.cuda.is_initialized():
        torch.cuda.set_device(index)
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def select_precision(flag: str, device: torch.device) -> Precision:
    """Resolve `--dtype`: bfloat16 where it is native, else float16 on a GPU, else float32.

    Raises:
        UserError: for fp8 on a device without it.
    """
    if flag == "fp8":
        if not has_float8(device):
            raise UserError(
                "--dtype fp8 needs a GPU of compute capability 8.9 or more, such as an H100, to "
                "train and to resume; use --dtype auto for a new run here"
            )
        return Precision(torch.bfloat16, "matmuls in fp8, the rest in bfloat16", float8=True)
    if flag != "auto":
        return Precision(getattr(torch, flag), "as requested")
    if device.type == "cuda":
        return _cuda_precision(device)
    if device.type == "cpu":
        return _cpu_precision()
    return Precision(torch.float32, "mixed precision on Apple GPUs has not been tried yet")


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies matrices in fp8."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


def select_eval_precision(flag: str, device: torch.device) -> Precision:
    """Resolve `--dtype` for evaluation, where fp8 means bfloat16."""
    return select_precision("bfloat16" if flag == "fp8" else flag, device)


def _cuda_precision(device: torch.device) -> Precision:
    if torch.version.hip:
        return Precision(torch.bfloat16, "native on the AMD GPUs that torch supports")
    # torch.cuda.is_bf16_supported() is also true where bfloat16 is emulated, and slow.
    major, minor = torch.cuda.get_device_capability(device)
    capability = f"compute capability {major}.{minor}"
    if major >= 8:
        return Precision(torch.bfloat16, f"native at {capability}")
    if major >= 7:
        return Precision(torch.float16, f"no native bfloat16 at {capability}, below 8.0")
    return Precision(torch.float32, f"no tensor cores at {capability}")


def _cpu_precision() -> Precision:
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    capabilities = get_capabilities() if get_capabilities else {}
    # Arm's bfloat16 instructions have not been measured yet.
    if capabilities.get("amx_bf16", False):
        return Precision(torch.bfloat16, "this CPU has AMX")
    if not capabilities.get("avx512_bf16", False):
        return Precision(torch.float32, "this CPU has no AVX512 or AMX bfloat16 instructions")
    if "Intel" in _cpu_vendor():
        # 2048^3 matmul on two cores: 177 GFLOP/s, against 339 in float32. AMD: 4x float32.
        return Precision(torch.float32, "without AMX, Intel's bfloat16 instructions are slower")
    return Precision(torch.bfloat16, "this CPU has bfloat16 instructions")


def _cpu_vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return platform.processor()


PEAK_FLOPS = {
    **dict.fromkeys(("H100", "H200", "H800", "GH200"), 989e12),
    "B200": 2250e12,
    **dict.fromkeys(("A100", "A800"), 312e12),
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense 16-bit FLOP/s with float32 accumulation, from NVIDIA's data sheets (SXM variants)."""


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of the device's tensor cores; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ") + " "
    if "PCIe" in name and "H100" in name:
        return 756e12
    return next((peak for model, peak in PEAK_FLOPS.items() if f"{model} " in name), None)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes/s between a CUDA device and its memory, from clock and bus width; 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    properties = torch.cuda.get_device_properties(device)
    # The clock is in kHz, with two transfers a cycle; the bus width is in bits.
    clock = getattr(properties, "memory_clock_rate", 0)
    return clock * 2e3 * getattr(properties, "memory_bus_width", 0) / 8


def usable_memory(device: torch.device) -> int | None:
    """Bytes this process can use: free memory plus what torch's allocator holds; None if unknown.

    On a GPU, capped by `torch.cuda.set_per_process_memory_fraction`.
    """
    free = free_memory(device)
    if free is None or device.type != "cuda":
        return free
    reserved = torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    limit = int(total * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + reserved, limit)


def free_memory(device: torch.device) -> int | None:
    """Free bytes of the GPU's memory, or of this machine's for a CPU; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):
        return None
    return min(free, _free_container_memory())


def _free_container_memory() -> int:
    """Bytes left of the cgroup's memory limit; a huge number if there is no limit."""
    try:
        folder = Path("/sys/fs/cgroup")
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # The page cache counts as used, and is reclaimed when memory is needed.
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return limit - used + cached
    except (OSError, ValueError, StopIteration):
        return 2**62


def keep_freed_memory() -> None:
    """Keep the heap that a step frees for the next one; does nothing without GNU's C library.

    By default that library returns freed memory to the kernel: a step of the CPU default then takes
    12,000 page faults, a sixth of its time.
    """
    # Windows has no CDLL(None), and other C libraries have no mallopt.
    with suppress(TypeError, OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)  # the largest values it accepts


def synchronize(device: torch.device) -> None:
    """Wait for all queued work of the device, before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def copy_to_host_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU; returns the function that waits for the copy.

    It waits for this one only, and `tensor.cpu()` for all kernels queued since, too.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    host = tensor.to("cpu", non_blocking=True)  # in pinned memory: else it would block
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def read() -> Tensor:
        copied.synchronize()
        return host

    return read


def seed_everything(config: Config, *, rank: int = 0) -> None:
    """Seed torch, and set the precision and determinism of matmuls, before anything is built."""
    # Another seed on each rank: the same dropout mask on all of them would average less noise.
    torch.manual_seed((config.seed + rank * 0x9E3779B97F4A7C15) % SEED_LIMIT)
    # TF32 for the matmuls that stay in float32.
    torch.set_float32_matmul_precision("high")
    if config.deterministic:
        # Required by torch, and read by cuBLAS when it initializes.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


@contextmanager
def default_torch_settings() -> Iterator[None]:
    """Torch's own settings in a block, and the caller's after it, whatever the block sets.

    In no_grad, in autocast, or with another default dtype or device, training would fail, or give
    other losses.
    """
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    autocast_devices = [d for d in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(d)]
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        for device_type in autocast_devices:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the RNG state at the end of a block, so that it does not change later draws."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if mps_state is not None:
        torch.mps.set_rng_state(mps_state)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """torch.autocast if the precision is mixed, else a null context."""
    return torch.autocast(device.type, precision.dtype) if precision.is_mixed else nullcontext()
