"""What this machine can do, each choice with its reason in a few words."""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from gptforge.errors import UserError


@dataclass(frozen=True)
class Precision:
    """The type of matrix products, and why. Weights and optimizer state are always float32."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """As `--dtype` has it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_mixed(self) -> bool:
        """Whether autocast is on."""
        return self.dtype != torch.float32

    @property
    def needs_scaler(self) -> bool:
        """float16 reaches only down to 6e-8: without scaling, small gradients vanish."""
        return self.dtype == torch.float16


def select_device(flag: str) -> tuple[torch.device, str]:
    """The device that `--device` asks for, or the best there is, and what it is.

    Raises:
        UserError: if the device is not there, with those that are.
    """
    kind, _, index = flag.partition(":")
    if flag == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if has_mps() else "cpu"
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdecimal())):
        raise UserError(f"--device {flag}: give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        return _cuda(flag, int(index or 0))
    if kind == "mps":
        if not has_mps():
            raise UserError(f"--device {flag}: torch finds no Apple GPU here; use --device auto")
        return torch.device("mps"), "Apple GPU"
    threads = torch.get_num_threads()
    return torch.device("cpu"), f"{threads} threads" if threads > 1 else "1 thread"


def _cuda(flag: str, index: int) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        raise UserError(f"--device {flag}: torch finds no CUDA GPU here; use --device auto")
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {flag}: the GPUs here are 0 to {torch.cuda.device_count() - 1}")
    # Triton's kernels start on the current device. Making 0 the current one, as it is from the
    # beginning, would wait for the driver.
    if index or torch.cuda.is_initialized():
        torch.cuda.set_device(index)
    return torch.device("cuda", index), torch.cuda.get_device_name(index)


def has_mps() -> bool:
    """Whether torch can use an Apple GPU."""
    return torch.backends.mps.is_available()


def select_precision(flag: str, device: torch.device) -> Precision:
    """bfloat16 where the hardware computes in it, else float16 on a GPU, else float32."""
    if flag != "auto":
        return Precision(getattr(torch, flag), "as asked")
    if device.type == "cuda":
        return _cuda_precision(device)
    if device.type == "cpu":
        return _cpu_precision()
    return Precision(torch.float32, "mixed precision on Apple GPUs has not been tried yet")


def _cuda_precision(device: torch.device) -> Precision:
    if torch.version.hip:
        return Precision(torch.bfloat16, "AMD GPUs that torch supports compute in it")
    # torch.cuda.is_bf16_supported() also says yes where bfloat16 is only emulated, and slow.
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return Precision(torch.bfloat16, f"native at compute capability {major}.{minor}")
    if major >= 7:
        return Precision(
            torch.float16, f"no native bfloat16 at compute capability {major}.{minor}, below 8.0"
        )
    return Precision(torch.float32, f"no tensor cores at compute capability {major}.{minor}")


def _cpu_precision() -> Precision:
    ask = getattr(torch.cpu, "get_capabilities", None)
    able = ask() if ask else {}
    # Arm's are left out until somebody has measured them.
    if able.get("amx_bf16", False):
        return Precision(torch.bfloat16, "this CPU has AMX")
    if not able.get("avx512_bf16", False):
        return Precision(torch.float32, "this CPU has no AVX512 or AMX bfloat16 instructions")
    if "Intel" in _cpu_vendor():
        # Products of 2048: 177 GFLOP/s on two cores, 339 in float32. AMD's are 4 times as fast.
        return Precision(torch.float32, "without AMX, Intel's bfloat16 instructions are slower")
    return Precision(torch.bfloat16, "this CPU has bfloat16 instructions")


def _cpu_vendor() -> str:
    """As it names itself, such as GenuineIntel."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return platform.processor()


PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense half-precision FLOP/s with float32 sums, from NVIDIA's data sheets (SXM where both are)."""


def peak_flops(device: torch.device) -> float | None:
    """The most FLOP/s that this device's matrix units could do; None where that is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ") + " "
    if "PCIe" in words and "H100" in words:
        return 756e12
    return next((peak for name, peak in PEAK_FLOPS.items() if f"{name} " in words), None)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second between a CUDA device and its memory, by its clock and width; 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    its = torch.cuda.get_device_properties(device)
    # In kHz, twice in a cycle; and in bits.
    return getattr(its, "memory_clock_rate", 0) * 2e3 * getattr(its, "memory_bus_width", 0) / 8


def usable_memory(device: torch.device) -> int | None:
    """Bytes that a GPU, or this machine, has for us, with those that we hold; None if unknown."""
    free = free_memory(device)
    if free is None or device.type != "cuda":
        return free
    held = torch.cuda.memory_reserved(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    # What `set_per_process_memory_fraction` grants.
    most = int(whole * torch.cuda.get_per_process_memory_fraction(device))
    return min(free + held, most)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU, or this machine, has left; None where there is no way to know."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, ValueError, StopIteration):
        return None
    return min(free, _container_memory())


def _container_memory() -> int:
    """Bytes that the container around us may still take; without one, more than there are."""
    try:
        folder = Path("/sys/fs/cgroup")
        most = int((folder / "memory.max").read_text())
        taken = int((folder / "memory.current").read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        # Files that were read are counted as taken, and given back when needed.
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return most - taken + cached
    except (OSError, ValueError, StopIteration):
        return 2**62


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Matrix products in the chosen type, the rest in float32."""
    return torch.autocast(device.type, precision.dtype) if precision.is_mixed else nullcontext()
