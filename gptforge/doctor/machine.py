"""What this machine can do, and why not."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from gptforge.data.checks import Finding, ok, warning
from gptforge.data.prepare.workers import num_cpus
from gptforge.device import (
    free_memory,
    peak_flops,
    select_device,
    select_precision,
)
from gptforge.errors import install_hint
from gptforge.files import cache_dir
from gptforge.kernel_select import select_kernels

EXTRAS = {
    "data": ("Parquet, .zst and the fastest encoder", ("pyarrow", "zstandard", "gigatoken")),
    "bpe": ("`gptforge tokenizer train`", ("tokenizers",)),
    "hf": ("`gptforge export --to hf` and `import`", ("transformers", "huggingface_hub")),
    "gguf": ("`gptforge export --to gguf`", ("gguf",)),
    "demo": ("`gptforge demo`", ("gradio",)),
}
LOW_DISK_BYTES = 10 * 10**9


def check_machine() -> list[Finding]:
    """Device, precision, compiler, memory, disk, packages; each with its reason."""
    device, note = select_device("auto")
    precision = select_precision("auto", device)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    found = [
        ok(f"{versions}, {platform.system()} on {platform.machine()}, {num_cpus()} cores"),
        ok(f"device: {device} ({note})"),
        ok(f"precision: {precision.name}, {precision.reason}"),
        *_gpus(),
        *_compiler(device),
        *_memory(device),
        *_disk(),
        *_extras(),
    ]
    kernels = select_kernels(device, precision)
    if kernels.fused_cross_entropy:
        found.insert(3, ok("kernels: our own for this device, beside torch's"))
    return found


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda or torch.version.hip:
            why = "torch was built for GPUs, and finds none"
            return [warning(why, "look for a driver with `nvidia-smi`, if there should be one")]
        if shutil.which("nvidia-smi"):
            return [
                warning(
                    "there is an NVIDIA driver, and this torch was built without CUDA",
                    "install the CUDA build: https://pytorch.org/get-started/locally",
                )
            ]
        return [ok("GPU: none that torch could use")]
    found = []
    for number in range(torch.cuda.device_count()):
        place = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(place)
        total = torch.cuda.get_device_properties(place).total_memory
        peak = peak_flops(place)
        speed = f", {peak / 1e12:,.0f} TFLOP/s at most" if peak else ""
        name = torch.cuda.get_device_name(place)
        found.append(
            ok(f"GPU {number}: {name}, {total / 1e9:.0f} GB, capability {major}.{minor}{speed}")
        )
    return found


def _compiler(device: torch.device) -> list[Finding]:
    if device.type != "cuda":
        return [ok(f"torch.compile: left out on {device.type}, it takes longer than it saves")]
    if importlib.util.find_spec("triton") is None:
        return [warning("torch.compile: there is no Triton here", "training goes on without it")]
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")):
        return [warning("torch.compile: there is no C compiler", "install gcc or clang")]
    return [ok("torch.compile: Triton and a C compiler are here; each run tries it out first")]


def _memory(device: torch.device) -> list[Finding]:
    found = []
    for place, name in ((torch.device("cpu"), "memory"), (device, "memory of the GPU")):
        free = free_memory(place) if place.type in ("cpu", "cuda") else None
        if free is not None and not (name != "memory" and place.type == "cpu"):
            found.append(ok(f"{name}: {free / 1e9:.1f} GB free"))
    return found


def _disk() -> list[Finding]:
    found = []
    for path, name in ((Path.cwd(), "this folder"), (cache_dir(), "the cache")):
        place = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(place).free
        what = f"disk of {name}: {free / 1e9:.0f} GB free"
        if free < LOW_DISK_BYTES:
            remedy = "a checkpoint of GPT-2 small takes 1.5 GB, and three are kept"
            found.append(warning(what, remedy))
        else:
            found.append(ok(what))
        if not os.access(place, os.W_OK):
            found.append(warning(f"{place} cannot be written to", "choose another --out_dir"))
    return found


def _extras() -> list[Finding]:
    found = []
    for extra, (purpose, packages) in EXTRAS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if extra == "data" and sys.version_info >= (3, 14) and "zstandard" in missing:
            missing.remove("zstandard")
        if missing:
            what = f"not here: {', '.join(missing)}, for {purpose}"
            found.append(Finding("ok", what, install_hint(extra)))
        else:
            named = ", ".join(f"{name} {_version(name)}" for name in packages)
            found.append(ok(f"{purpose}: {named}"))
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
