"""Checks of the machine: what it can do, and why not."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gptforge.config import Config
from gptforge.data.prepare.workers import num_cpus
from gptforge.device import free_memory, has_float8, peak_flops, select_device, select_precision
from gptforge.errors import install_hint
from gptforge.files import cache_dir, free_disk_bytes
from gptforge.findings import Finding, ok, warning
from gptforge.kernel_select import select_kernels

EXTRAS = {
    "data": ("Parquet, .zst and the fastest encoder", ("pyarrow", "zstandard", "gigatoken")),
    "hf": ("`gptforge export --to hf` and `import`", ("transformers", "huggingface_hub")),
    "gguf": ("`gptforge export --to gguf`", ("gguf",)),
    "demo": ("`gptforge demo`", ("starlette", "uvicorn", "pydantic")),
    "sweep": ("`gptforge sweep --random` and `--tpe`", ("optuna",)),
}
LOW_DISK_BYTES = 10 * 10**9


def check_machine() -> list[Finding]:
    """Device, precision, compiler, memory, disk and packages, each with the reason."""
    device, reason = select_device("auto")
    precision = select_precision("auto", device)
    fp8 = "; --dtype fp8 works too" if has_float8(device) else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    found = [
        ok(f"{versions}, {platform.system()} on {platform.machine()}, {num_cpus()} cores"),
        ok(f"device: {device} ({reason})"),
        ok(f"precision: {precision.name}, {precision.reason}{fp8}"),
    ]
    if select_kernels(Config(), device, precision).fused_cross_entropy:
        found.append(ok("kernels: GPT-Forge's own for this device, beside torch's"))
    found += [*_check_gpus(), _check_compiler(device), *_check_memory(device)]
    return [*found, *_check_disk(), *_check_extras()]


def _check_gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda or torch.version.hip:
            hint = "look for a driver with `nvidia-smi`, if there should be one"
            return [warning("torch was built for GPUs, and finds none", hint)]
        if shutil.which("nvidia-smi"):
            hint = "install the CUDA build: https://pytorch.org/get-started/locally"
            return [warning("there is an NVIDIA driver, but torch was built without CUDA", hint)]
        return [ok("GPU: none that torch can use")]
    found = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", i)
        properties = torch.cuda.get_device_properties(gpu)
        size = f"{properties.total_memory / 1e9:.0f} GB"
        capability = f"{properties.major}.{properties.minor}"
        speed = f", at most {peak / 1e12:,.0f} TFLOP/s" if (peak := peak_flops(gpu)) else ""
        found.append(ok(f"GPU {i}: {properties.name}, {size}, capability {capability}{speed}"))
    return found


def _check_compiler(device: torch.device) -> Finding:
    if device.type != "cuda":
        return ok(f"torch.compile: off on {device.type}, where it takes longer than it saves")
    if importlib.util.find_spec("triton") is None:
        return warning("torch.compile: Triton is missing", "training runs without it")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        return warning("torch.compile: there is no C compiler", "install gcc or clang")
    return ok("torch.compile: Triton and a C compiler are installed; each run tests it first")


def _check_memory(device: torch.device) -> list[Finding]:
    names = {torch.device("cpu"): "memory"}
    if device.type == "cuda":
        names[device] = "GPU memory"
    free = {name: free_memory(place) for place, name in names.items()}
    return [ok(f"{name}: {n / 1e9:.1f} GB free") for name, n in free.items() if n is not None]


def _check_disk() -> list[Finding]:
    found = []
    for path, name in ((Path.cwd(), "this folder"), (cache_dir(), "the cache")):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = free_disk_bytes(path)
        if free is not None:
            message = f"disk of {name}: {free / 1e9:.0f} GB free"
            hint = "a checkpoint of GPT-2 small takes 1.5 GB, and up to four are kept"
            found.append(warning(message, hint) if free < LOW_DISK_BYTES else ok(message))
        if not os.access(existing, os.W_OK):
            found.append(warning(f"{existing} is not writable", "choose another --out_dir"))
    return found


def _check_extras() -> list[Finding]:
    found = []
    for extra, (purpose, packages) in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if extra == "data" and sys.version_info >= (3, 14) and "zstandard" in missing:
            missing.remove("zstandard")
        if missing:
            message = f"{purpose}: {', '.join(missing)} not installed"
            found.append(replace(ok(message), fix=install_hint(extra)))
        else:
            versions = ", ".join(f"{name} {_version(name)}" for name in packages)
            found.append(ok(f"{purpose}: {versions}"))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
